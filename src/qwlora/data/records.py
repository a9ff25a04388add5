"""A record (a row of a table, a line of JSON) to a document.

Which columns are used is asked for in the recipe, or follows from their names:

    text                       running text
    prompt and completion      the completion is learnt
    messages                   a list of {role, content}; the assistant's messages are learnt
    and tools, if there        beside messages: definitions of the functions that may be called, a list of objects or the JSON of one

A record that is not what it should be is refused with the place where it stands; nothing is mended or left out in silence.
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
    """A record has its fields, and nothing is in them."""


@dataclass(frozen=True)
class Columns:
    """Names that the recipe gives to columns; None where it leaves them to be found."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None

    @property
    def asked(self) -> dict[str, str]:
        return {role: name for role, name in vars(self).items() if name is not None}


@dataclass(frozen=True)
class Fields:
    """The kind of documents in a source, and the column that each of its parts stands in."""

    kind: str
    names: Mapping[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.names.values())

    def among(self, present: Collection[str]) -> tuple[str, ...]:
        """The columns of a table that are read: those that must be there, and the one that may be."""
        may = (
            (TOOLS,)
            if self.kind == "conversations" and TOOLS in present and TOOLS not in self.columns
            else ()
        )
        return (*self.columns, *may)


def choose_fields(present: Collection[str], columns: Columns, where: str) -> Fields:
    """Decide which of the columns that are there are used.

    Raises:
        SourceError: a column that was asked for is not there, none of the kinds is complete, or more than one is.
    """
    if asked := columns.asked:
        kind = next(kind for kind, roles in KINDS.items() if set(asked) & set(roles))
        names = {role: asked.get(role, role) for role in KINDS[kind]}
        for role, name in names.items():
            if name not in present:
                raise SourceError(
                    f"{where}: there is no column {name!r} (data.{role}_column){suggestion(name, present)}"
                )
        return Fields(kind, names)
    complete = [kind for kind, roles in KINDS.items() if set(roles) <= set(present)]
    if len(complete) == 1:
        return Fields(complete[0], {role: role for role in KINDS[complete[0]]})
    if complete:
        found = " and ".join("+".join(KINDS[kind]) for kind in complete)
        asking = " or ".join(f"data.{KINDS[kind][0]}_column: {KINDS[kind][0]}" for kind in complete)
        raise SourceError(
            f"{where}: both {found} are there, and only one of them can be learnt from: say which in the recipe ({asking})"
        )
    guesses = [
        f"data.{role}_column: {near}"
        for roles in KINDS.values()
        for role in roles
        for near in near_names(role, present, 1)
    ]
    raise SourceError(
        f"{where}: neither text, nor prompt and completion, nor messages are among its columns ({listed(present, 20)}); "
        f"name them in the recipe{', perhaps ' + guesses[0] if guesses else ' (data.text_column and so on)'}"
    )


def make_document(record: Any, fields: Fields, where: str) -> Document:
    """The document in `record`.

    Raises:
        EmptyRecordError: the record is empty.
        SourceError: a field is missing or of another type, or a message is not what a message must be.
    """
    if not isinstance(record, Mapping):
        raise SourceError(
            f"{where}: a record must be an object with named fields, and this is {_type(record)}"
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
                f"{where}: this record has {'+'.join(KINDS[others[0]])}, those before it {'+'.join(fields.columns)}; a source holds one kind"
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
            f"{where}: {name!r} must be a list of messages with role and content, and is {_type(value)}"
        )
    if not value:
        raise EmptyRecordError(f"{where}: {name!r} is empty")
    messages = tuple(
        _message(message, f"{where}: message {i}") for i, message in enumerate(value, 1)
    )
    if not any(m["role"] == ASSISTANT for m in messages):
        raise SourceError(
            f"{where}: no message is the {ASSISTANT}'s, so there is nothing to learn from it"
        )
    return messages


def _message(message: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(message, Mapping):
        raise SourceError(
            f"{where} must be an object with role and content, and is {_type(message)}"
        )
    kept = {
        key: value for key, value in message.items() if value is not None
    }  # a table fills what a message lacks with null
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
    if isinstance(
        value, str
    ):  # tables hold it so, since the tools of one row differ from another's
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise SourceError(
                f"{where}: {TOOLS!r} is a string and must be the JSON of a list of tools then, and is not: {error}"
            ) from error
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise SourceError(
            f"{where}: {TOOLS!r} must be a list of tools, or the JSON of one, and is {_type(value)}"
        )
    for i, tool in enumerate(value, 1):
        if not isinstance(tool, Mapping):
            raise SourceError(
                f"{where}: tool {i} must be an object that defines it (a JSON schema), and is {_type(tool)}"
            )
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{where}: {TOOLS!r} holds what JSON cannot: {error}") from error
    _string(written, TOOLS, where)
    return tuple(value)


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise SourceError(f"{where}: {name!r} must be a string, and is {_type(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{where}: {name!r} holds half a surrogate pair at character {error.start}, which no UTF-8 text has"
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
