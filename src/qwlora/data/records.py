"""A record (a row of a table, a line of JSON) to a document.

The recipe names the columns, or their names determine the kind; docs/data.md has the table. A bad
record is refused with its file and line. Nothing is repaired or skipped silently.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from qwlora.data.document import ASSISTANT, ROLES, Completion, Conversation, Document, Text
from qwlora.errors import SourceError, foreign_as, listed, suggestion
from qwlora.formats.aimet_encodings.documents import describe

KINDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "completions": ("prompt", "completion"),
    "conversations": ("messages",),
    "instructions": ("instruction", "output"),
}
TOOLS = "tools"
OPTIONAL = {"conversations": (TOOLS,), "instructions": ("input",)}
# Those whose columns a recipe may name. Tools always have the column `tools`.
FIELDS = (*(name for fields in KINDS.values() for name in fields), "input")
_SHAREGPT_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), ASSISTANT),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
# Stanford Alpaca's prompt, as in the column `text` of its dataset
_ALPACA = """\
Below is an instruction that describes a task{paired}. Write a response that appropriately \
completes the request.

### Instruction:
{instruction}

{input}### Response:
"""
# Names of columns that other tools' examples have, for a suggestion.
_PAIRS = ("question", "query", "input", "prompt"), ("answer", "response", "output", "completion")
_INPUTS = ("input", "context", "passage", "document")
_PAIRED = ", paired with an input that provides further context"


class EmptyRecordError(SourceError):
    """A record has the right fields, but one is empty or null."""


Columns = dict[str, str]
"""The column of each field that records of a source have. `tools` and `input` may be missing."""
TEXT_COLUMNS: Columns = {"text": "text"}


def _columns(kind: str, asked: Mapping[str, str]) -> Columns:
    required = {field: asked.get(field, field) for field in KINDS[kind]}
    optional = {field: asked.get(field, field) for field in OPTIONAL.get(kind, ())}
    # A recipe may take the instruction from a column called `input`.
    taken = required.values()
    return required | {field: name for field, name in optional.items() if name not in taken}


_BY_NAME = (
    *(_columns(kind, {}) for kind in KINDS),
    _columns("conversations", {"messages": "conversations"}),
)


def _required(columns: Columns) -> list[str]:
    return [name for field, name in columns.items() if field not in (TOOLS, "input")]


def choose_columns(present: Collection[str], asked: Mapping[str, str], where: str) -> Columns:
    """Decide which of the columns `present` are used; the recipe `asked` for some, by field."""
    if asked:
        kind = next(k for k, fields in KINDS.items() if {*fields, *OPTIONAL.get(k, ())} & {*asked})
        columns = _columns(kind, asked)
        for field, name in {**columns, **asked}.items():
            if name not in present and (field in KINDS[kind] or field in asked):
                raise SourceError(
                    f"{where}: there is no column {name!r} (data.{field}_column)"
                    f"{suggestion(name, present)}"
                )
        return columns
    complete = [columns for columns in _BY_NAME if set(_required(columns)) <= set(present)]
    if len(complete) == 1:
        return complete[0]
    if complete:
        kinds = " and ".join("+".join(_required(columns)) for columns in complete)
        first = [next(iter(columns.items())) for columns in complete]
        keys = " or ".join(f"--set data.{field}_column={name}" for field, name in first)
        raise SourceError(
            f"{where}: has both {kinds}, but only one can be trained on. Choose one in the recipe, "
            f"or with {keys}"
        )
    pair = [next((name for name in names if name in present), "...") for names in _PAIRS]
    given = next((name for name in _INPUTS if name in present and name not in pair), None)
    advised = dict(zip(KINDS["completions"], pair, strict=True))
    if given is not None:  # a prompt and a completion alone would drop it
        advised = {"instruction": pair[0], "input": given, "output": pair[1]}
    keys = " ".join(f"--set data.{field}_column={name}" for field, name in advised.items())
    raise SourceError(
        f"{where}: none of its columns ({listed(present, 20)}) has a known name, such as text. "
        f"Name them in the recipe or with --set: {keys}; running text: --set data.text_column=..."
    )


def make_document(record: Any, columns: Columns, where: str) -> Document:
    """The document in `record`.

    Raises:
        EmptyRecordError: the record, or a field it needs, is empty or null.
        SourceError: a field is missing or has the wrong type, or a message is malformed.
    """
    with _named(where):
        if not isinstance(record, Mapping):
            raise SourceError(
                f"a record must be an object with named fields, not {describe(record)}"
            )
        if not record:
            raise EmptyRecordError("the record is empty")
        needed = _required(columns)
        if missing := [name for name in needed if name not in record]:
            raise SourceError(
                f"the field {missing[0]!r} is missing{suggestion(missing[0], record)}. The records "
                f"before it have {'+'.join(needed)}, and a source holds one kind"
            )
        if nulls := [name for name in needed if record[name] is None]:
            raise EmptyRecordError(f"{nulls[0]!r} is null")
        if name := columns.get("messages"):
            tools = _tools(record.get(columns[TOOLS])) if TOOLS in columns else ()
            return Conversation(_messages(record[name], name), where, tools)
        values = {
            field: _string(record[name], name)
            for field, name in columns.items()
            if record.get(name) is not None
        }
        if empty := [name for name in needed if not record[name].strip()]:
            raise EmptyRecordError(f"{empty[0]!r} is empty")
    match values:
        case {"text": text}:
            return Text(text, where)
        case {"prompt": prompt, "completion": completion}:
            return Completion(prompt, completion, where)
    # Alpaca's own prompt as plain text; as a user's message the instruction, and the input below it
    message, about = values["instruction"], values.get("input", "")
    shown = {"instruction": message, "paired": "", "input": ""}
    if about.strip():
        message = f"{message}\n\n{about}"
        shown |= {"paired": _PAIRED, "input": f"### Input:\n{about}\n\n"}
    return Completion(_ALPACA.format(**shown), values["output"], where, message)


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except SourceError as error:
        raise type(error)(f"{where}: {error}") from error


def _messages(value: Any, name: str) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise SourceError(
            f"{name!r} must be a list of messages with role and content, not {describe(value)}"
        )
    if not value:
        raise EmptyRecordError(f"{name!r} is empty")
    # Datasets use the column `conversations` for both forms, so the first message decides.
    sharegpt = isinstance(value[0], Mapping) and "from" in value[0] and "role" not in value[0]
    messages = []
    for number, message in enumerate(value, 1):
        with _named(f"message {number}"):
            messages.append(_message(message, sharegpt))
    if not any(message["role"] == ASSISTANT for message in messages):
        raise SourceError(f"there is no message of the {ASSISTANT} to train on")
    return tuple(messages)


def _message(message: Any, sharegpt: bool) -> Mapping[str, Any]:
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(message, Mapping):
        raise SourceError(f"must be an object with role and content, not {describe(message)}")
    rest = {key: value for key, value in message.items() if value is not None}
    calls_tools = bool(rest.get("tool_calls"))
    for key in (role_key, content_key):
        if key not in rest and not (key == content_key and calls_tools):
            problem = "is null" if key in message else f"is missing{suggestion(key, message)}"
            raise SourceError(f"{key!r} {problem}")
    name = _string(rest.pop(role_key), role_key)
    role = _SHAREGPT_ROLES.get(name, name) if sharegpt else name
    if role not in ROLES:
        known = (*ROLES, *_SHAREGPT_ROLES) if sharegpt else ROLES
        raise SourceError(f"unknown role {name!r}{suggestion(name, known)}")
    if content_key not in rest:
        return {"role": role, **rest}
    content = _string(rest.pop(content_key), content_key)
    if not content.strip() and role in ("user", ASSISTANT) and not calls_tools:
        raise EmptyRecordError(f"the {role}'s {content_key} is empty")
    return {"role": role, "content": content, **rest}


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    # Tools of different structure fit into a column of a table only as JSON.
    if isinstance(value, str):
        with foreign_as(SourceError, f"{TOOLS!r} is a string, but not the JSON of a list of tools"):
            value = json.loads(value) if value.strip() else None
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise SourceError(
            f"{TOOLS!r} must be a list of tools, or the JSON of one, not {describe(value)}"
        )
    for number, tool in enumerate(value, 1):
        if not isinstance(tool, Mapping):
            raise SourceError(
                f"tool {number} must be an object (a JSON schema), not {describe(tool)}"
            )
    with foreign_as(SourceError, f"{TOOLS!r} cannot be written as JSON"):
        _string(json.dumps(value, ensure_ascii=False, allow_nan=False), TOOLS)
    return tuple(value)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise SourceError(f"{name!r} must be a string, not {describe(value)}")
    # JSON can write half of a surrogate pair (`\ud800`), which a tokenizer cannot take.
    with foreign_as(SourceError, f"{name!r} is not UTF-8 text"):
        value.encode()
    return value
