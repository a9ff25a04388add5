"""A record (a row of a table, a line of JSON) to a document.

The recipe names the columns, or their names determine the kind:

    text                       running text
    prompt and completion      the completion counts in the loss
    messages                   a list of {role, content}; the assistant's count in the loss
    tools, next to messages    optional: JSON schemas of the functions that may be called, as a list
                               or as the JSON of a list

A bad record is refused with its file and line. Nothing is repaired or skipped silently.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwlora.data.document import ASSISTANT, ROLES, Completion, Conversation, Document, Text
from qwlora.errors import SourceError
from qwlora.messages import listed, near_names, suggestion

KINDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "completions": ("prompt", "completion"),
    "conversations": ("messages",),
}
TOOLS = "tools"


class EmptyRecordError(SourceError):
    """A record has the right fields, but they are empty."""


@dataclass(frozen=True)
class Columns:
    """Column names from the recipe; None: found by name."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None

    @property
    def asked(self) -> dict[str, str]:
        return {role: name for role, name in vars(self).items() if name is not None}


@dataclass(frozen=True)
class Fields:
    """The kind of documents in a source, and the column of each field."""

    kind: str
    names: Mapping[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.names.values())

    def among(self, present: Collection[str]) -> tuple[str, ...]:
        """The columns of a table to read: the required ones, and `tools` if present."""
        may = (
            (TOOLS,)
            if self.kind == "conversations" and TOOLS in present and TOOLS not in self.columns
            else ()
        )
        return (*self.columns, *may)


def choose_fields(present: Collection[str], columns: Columns, where: str) -> Fields:
    """Decide which of the columns `present` are used.

    Raises:
        SourceError: a column from the recipe is missing, or the columns fit no kind or several.
    """
    if asked := columns.asked:
        kind = next(kind for kind, roles in KINDS.items() if set(asked) & set(roles))
        names = {role: asked.get(role, role) for role in KINDS[kind]}
        for role, name in names.items():
            if name not in present:
                raise SourceError(
                    f"{where}: there is no column {name!r} (data.{role}_column)"
                    f"{suggestion(name, present)}"
                )
        return Fields(kind, names)
    complete = [kind for kind, roles in KINDS.items() if set(roles) <= set(present)]
    if len(complete) == 1:
        return Fields(complete[0], {role: role for role in KINDS[complete[0]]})
    if complete:
        found = " and ".join("+".join(KINDS[kind]) for kind in complete)
        asking = " or ".join(f"data.{KINDS[kind][0]}_column: {KINDS[kind][0]}" for kind in complete)
        raise SourceError(
            f"{where}: has both {found}, and only one of them can be trained on. Say which in the "
            f"recipe ({asking})"
        )
    guesses = [
        f"data.{role}_column: {near}"
        for roles in KINDS.values()
        for role in roles
        for near in near_names(role, present, 1)
    ]
    raise SourceError(
        f"{where}: its columns ({listed(present, 20)}) are neither text, nor prompt and "
        "completion, nor messages. Name them in the recipe"
        f"{', perhaps ' + guesses[0] if guesses else ' (data.text_column and so on)'}"
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
    missing = [name for name in fields.columns if name not in record]
    if missing:
        others = [
            kind
            for kind, roles in KINDS.items()
            if kind != fields.kind and set(roles) <= set(record)
        ]
        if others:
            raise SourceError(
                f"{where}: this record has {'+'.join(KINDS[others[0]])}, those before it "
                f"{'+'.join(fields.columns)}. A source holds one kind"
            )
        if not record:
            raise EmptyRecordError(f"{where}: the record is empty")
        raise SourceError(
            f"{where}: the field {missing[0]!r} is missing{suggestion(missing[0], record)}"
        )
    values = {role: record[name] for role, name in fields.names.items()}
    if fields.kind == "conversations":
        tools = () if TOOLS in fields.columns else _tools(record.get(TOOLS), where)
        return Conversation(
            _messages(values["messages"], fields.names["messages"], where), where, tools
        )
    strings = {role: _string(value, fields.names[role], where) for role, value in values.items()}
    for role, value in strings.items():
        if not value.strip():
            raise EmptyRecordError(f"{where}: {fields.names[role]!r} is empty")
    return (
        Text(strings["text"], where)
        if fields.kind == "text"
        else Completion(strings["prompt"], strings["completion"], where)
    )


def _messages(value: Any, name: str, where: str) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise SourceError(
            f"{where}: {name!r} must be a list of messages with role and content, "
            f"not {_type(value)}"
        )
    if not value:
        raise EmptyRecordError(f"{where}: {name!r} is empty")
    messages = tuple(
        _message(message, f"{where}: message {i}") for i, message in enumerate(value, 1)
    )
    if not any(m["role"] == ASSISTANT for m in messages):
        raise SourceError(f"{where}: there is no message of the {ASSISTANT} to train on")
    return messages


def _message(message: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(message, Mapping):
        raise SourceError(f"{where} must be an object with role and content, not {_type(message)}")
    kept = {
        key: value for key, value in message.items() if value is not None
    }  # tables add missing keys as null
    for key in ("role", "content"):
        if key not in kept and not (key == "content" and kept.get("tool_calls")):
            what = "is null" if key in message else f"is missing{suggestion(key, message)}"
            raise SourceError(f"{where}: {key!r} {what}")
    role = _string(kept["role"], "role", where)
    if role not in ROLES:
        raise SourceError(f"{where}: unknown role {role!r}{suggestion(role, ROLES)}")
    if (
        "content" in kept
        and not _string(kept["content"], "content", where).strip()
        and role in ("user", ASSISTANT)
        and not kept.get("tool_calls")
    ):
        raise EmptyRecordError(f"{where}: the {role}'s content is empty")
    return kept


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
    if value is None:
        return "null"
    if isinstance(value, float) and value != value:
        return "nan"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")
