"""A record (a row of a table, a line of JSON) to a document.

The recipe names the columns, or their names determine the kind:

    text                       running text
    prompt and completion      the completion counts in the loss
    messages                   a list of {role, content}; the assistant's count in the loss
    conversations              the same in ShareGPT's form: a list of {from, value}. The first
                               message determines which form a list has, not the column
    tools, next to messages    optional: JSON schemas of the functions that may be called, as a list
                               or as the JSON of a list
    instruction and output     Alpaca: the output counts in the loss
    input, next to them        optional: what the instruction is about

A bad record is refused with its file and line. Nothing is repaired or skipped silently.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwlora.data.document import ASSISTANT, ROLES, Completion, Conversation, Document, Text
from qwlora.errors import SourceError, listed, near_names, suggestion

KINDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "completions": ("prompt", "completion"),
    "conversations": ("messages",),
    "instructions": ("instruction", "output"),
}
TOOLS = "tools"
_OPTIONAL = {"conversations": (TOOLS,), "instructions": ("input",)}
FIELDS = (*(name for fields in KINDS.values() for name in fields), "input")
"""Fields whose columns a recipe may name."""
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "observation": "tool",
    "function_response": "tool",
}
# Stanford Alpaca's prompt, as in the column `text` of its dataset
_ALPACA = """\
Below is an instruction that describes a task{paired}. Write a response that appropriately \
completes the request.

### Instruction:
{instruction}

{input}### Response:
"""
_PAIRED = ", paired with an input that provides further context"
_TYPES = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


class EmptyRecordError(SourceError):
    """A record has the right fields, but they are empty."""


@dataclass(frozen=True)
class Fields:
    """The kind of records in a source, and the column of each field.

    Args:
        names: columns of the required fields.
        optional: columns of fields that a record may lack.
    """

    kind: str
    names: Mapping[str, str]
    optional: Mapping[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.names.values())

    def among(self, present: Collection[str]) -> tuple[str, ...]:
        """The columns of a table to read: the required ones, and the optional ones it has."""
        return (*self.columns, *(name for name in self.optional.values() if name in present))


def _fields(kind: str, asked: Mapping[str, str]) -> Fields:
    """Fields of `kind`, in the columns `asked` or in those named like the fields."""
    names = {role: asked.get(role, role) for role in KINDS[kind]}
    optional = {role: asked.get(role, role) for role in _OPTIONAL.get(kind, ())}
    taken = set(names.values())
    return Fields(kind, names, {r: name for r, name in optional.items() if name not in taken})


TEXT_FIELDS = _fields("text", {})
_FOUND_BY_NAME = (
    *(_fields(kind, {}) for kind in KINDS),
    _fields("conversations", {"messages": "conversations"}),
)


def choose_fields(present: Collection[str], asked: Mapping[str, str], where: str) -> Fields:
    """Decide which of the columns `present` are used; the recipe `asked` for some, by field.

    Raises:
        SourceError: a column from the recipe is missing, the columns fit no kind or several, or
            they hold preferences (chosen and rejected).
    """
    if asked:
        kind = next(
            kind for kind, roles in KINDS.items() if set(asked) & {*roles, *_OPTIONAL.get(kind, ())}
        )
        fields = _fields(kind, asked)
        for role, name in {**fields.names, **asked}.items():
            if name not in present:
                raise SourceError(
                    f"{where}: there is no column {name!r} (data.{role}_column)"
                    f"{suggestion(name, present)}"
                )
        return fields
    lower = {name.lower(): name for name in present}
    if "rejected" in lower and (chosen := lower.get("chosen")):
        pair = (
            f"data.prompt_column: prompt and data.completion_column: {chosen}"
            if "prompt" in present
            else f"data.text_column: {chosen}"
        )
        raise SourceError(
            f"{where}: these are preference data (columns {listed(present, 20)}): pairs of a "
            "chosen and a rejected answer, as DPO takes them. QWLoRA trains on answers, not on "
            f"preferences. To train on the chosen answers, set data.messages_column: {chosen} if "
            f"it holds lists of messages, or {pair} if it holds text"
        )
    complete = [fields for fields in _FOUND_BY_NAME if set(fields.columns) <= set(present)]
    if len(complete) == 1:
        return complete[0]
    if complete:
        kinds = " and ".join("+".join(fields.columns) for fields in complete)
        first = [next(iter(fields.names.items())) for fields in complete]
        keys = " or ".join(f"data.{role}_column: {name}" for role, name in first)
        raise SourceError(
            f"{where}: has both {kinds}, and only one of them can be trained on. Say which in the "
            f"recipe ({keys})"
        )
    guesses = [
        f", perhaps data.{role}_column: {near}"
        for roles in KINDS.values()
        for role in roles
        for near in near_names(role, present, 1)
    ]
    raise SourceError(
        f"{where}: its columns ({listed(present, 20)}) are neither text, nor prompt and "
        "completion, nor messages or conversations, nor instruction and output. Name them in the "
        f"recipe{(guesses or [' (data.text_column and so on)'])[0]}"
    )


def make_document(record: Any, fields: Fields, where: str) -> Document:
    """The document in `record`.

    Raises:
        EmptyRecordError: the record is empty.
        SourceError: a field is missing or has the wrong type, or a message is malformed.
    """
    if not isinstance(record, Mapping):
        raise SourceError(
            f"{where}: a record must be an object with named fields, not {_type(record)}"
        )
    if missing := [name for name in fields.columns if name not in record]:
        if not record:
            raise EmptyRecordError(f"{where}: the record is empty")
        for other in _FOUND_BY_NAME:
            if set(other.columns) <= set(record):
                raise SourceError(
                    f"{where}: this record has {'+'.join(other.columns)}, those before it "
                    f"{'+'.join(fields.columns)}. A source holds one kind"
                )
        raise SourceError(
            f"{where}: the field {missing[0]!r} is missing{suggestion(missing[0], record)}"
        )
    if fields.kind == "conversations":
        tools = _tools(record.get(TOOLS), where) if TOOLS in fields.optional else ()
        name = fields.names["messages"]
        return Conversation(_messages(record[name], name, where), where, tools)
    values = {role: _string(record[name], name, where) for role, name in fields.names.items()}
    for role, value in values.items():
        if not value.strip():
            raise EmptyRecordError(f"{where}: {fields.names[role]!r} is empty")
    if fields.kind == "text":
        return Text(values["text"], where)
    if fields.kind == "completions":
        return Completion(values["prompt"], values["completion"], where)
    # Alpaca's own prompt as plain text; as a user's message the instruction, and the input below it
    column = fields.optional.get("input")
    extra = "" if column is None else record.get(column)
    about = "" if column is None or extra is None else _string(extra, column, where)
    has_input = bool(about.strip())
    prompt = _ALPACA.format(
        instruction=values["instruction"],
        paired=_PAIRED if has_input else "",
        input=f"### Input:\n{about}\n\n" if has_input else "",
    )
    message = f"{values['instruction']}\n\n{about}" if has_input else values["instruction"]
    return Completion(prompt, values["output"], where, message)


def _messages(value: Any, name: str, where: str) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise SourceError(
            f"{where}: {name!r} must be a list of messages with role and content, "
            f"not {_type(value)}"
        )
    if not value:
        raise EmptyRecordError(f"{where}: {name!r} is empty")
    sharegpt = isinstance(value[0], Mapping) and "from" in value[0] and "role" not in value[0]
    messages = tuple(
        _message(message, f"{where}: message {i}", sharegpt) for i, message in enumerate(value, 1)
    )
    if not any(m["role"] == ASSISTANT for m in messages):
        raise SourceError(f"{where}: there is no message of the {ASSISTANT} to train on")
    return messages


def _message(message: Any, where: str, sharegpt: bool) -> Mapping[str, Any]:
    """A message with role and content; ShareGPT's has `from` and `value` instead."""
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(message, Mapping):
        raise SourceError(
            f"{where} must be an object with {role_key} and {content_key}, not {_type(message)}"
        )
    rest = {key: value for key, value in message.items() if value is not None}
    calls_tools = bool(rest.get("tool_calls"))
    for key in (role_key, content_key):
        if key not in rest and not (key == content_key and calls_tools):
            what = "is null" if key in message else f"is missing{suggestion(key, message)}"
            raise SourceError(f"{where}: {key!r} {what}")
    name = _string(rest.pop(role_key), role_key, where)
    role = _SHAREGPT_ROLES.get(name, name) if sharegpt else name
    if role not in ROLES:
        known = (*ROLES, *_SHAREGPT_ROLES) if sharegpt else ROLES
        raise SourceError(f"{where}: unknown role {name!r}{suggestion(name, known)}")
    if content_key not in rest:
        return {"role": role, **rest}
    content = _string(rest.pop(content_key), content_key, where)
    if not content.strip() and role in ("user", ASSISTANT) and not calls_tools:
        raise EmptyRecordError(f"{where}: the {role}'s {content_key} is empty")
    return {"role": role, "content": content, **rest}


def _tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str):  # as in tables, where the tools of rows differ in structure
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise SourceError(
                f"{where}: {TOOLS!r} is a string, but not the JSON of a list of tools: {error}"
            ) from error
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise SourceError(
            f"{where}: {TOOLS!r} must be a list of tools, or the JSON of one, not {_type(value)}"
        )
    for i, tool in enumerate(value, 1):
        if not isinstance(tool, Mapping):
            raise SourceError(
                f"{where}: tool {i} must be an object (a JSON schema), not {_type(tool)}"
            )
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{where}: {TOOLS!r} cannot be written as JSON: {error}") from error
    _string(written, TOOLS, where)
    return tuple(value)


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise SourceError(f"{where}: {name!r} must be a string, not {_type(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{where}: {name!r} holds half a surrogate pair at character {error.start}, which is "
            "not valid UTF-8"
        ) from error
    return value


def _type(value: Any) -> str:
    is_nan = isinstance(value, float) and value != value
    return "nan" if is_nan else _TYPES.get(type(value), f"a {type(value).__name__}")
