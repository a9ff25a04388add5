"""Problems of an encodings file, and untrusted text and values on one short line.

`findings_of` turns pydantic's errors into findings that name the entry and the field.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from qwlora.errors import EncodingsFileError

Severity = Literal["error", "warning"]

VECTOR_FIELDS = {"rows_per_block", "cols_per_block", "vector_dim", "vector_stride", "index_bw"}
_KINDS = {"integer", "float", "items", "plain", "nested"}  # in pydantic's paths, not in files


@dataclass(frozen=True)
class Finding:
    """One problem of a file.

    Args:
        severity: `error`: a runtime computes something else, or nothing; `warning`: legal, but
            unusual.
        where: name of the encoding, or the section of the file.
        field: of the encoding, or "".
    """

    severity: Severity
    where: str
    field: str
    message: str

    def __str__(self) -> str:
        place = printable(self.where) + (f", {printable(self.field)}" if self.field else "")
        return f"{place}: {self.message}"


def findings_of(error: ValidationError, document: dict[str, Any]) -> Iterator[Finding]:
    """The problems that pydantic found in `document`."""
    names = {section: _names(section, entries) for section, entries in document.items()}
    for problem in error.errors(include_url=False):
        section, *path = problem["loc"]
        where, keys = "file", list(problem["loc"])
        if path and isinstance(path[0], int) and section in names:
            where, keys = names[str(section)][path[0]], path[1:]
        field = ".".join(
            f"item {key}" if isinstance(key, int) else key for key in keys if key not in _KINDS
        )
        for message in _messages(dict(problem)):
            yield Finding("error", where, field, message)


def _names(section: str, entries: Any) -> list[str]:
    """The names of entries, which are keys (0.6.1) or fields, or their places in the section."""
    if isinstance(entries, dict):
        return [name or "''" for name in entries]
    names = []
    for i, entry in enumerate(entries if isinstance(entries, list) else ()):
        name = entry.get("name") if isinstance(entry, dict) else None
        names.append(name if isinstance(name, str) and name else f"{section}[{i}]")
    return names


def _messages(problem: dict[str, Any]) -> tuple[str, ...]:
    kind, value = problem["type"], problem["input"]
    if value == "VECTOR" or problem["loc"][-1] in VECTOR_FIELDS:
        return ("is vector quantization, which is not supported",)
    if kind == "missing":
        return ("is missing",)
    if kind == "extra_forbidden":
        return ("is not a field of this entry in this version",)
    if kind == "value_error":
        reason = problem["ctx"]["error"]
        return reason.problems if isinstance(reason, EncodingsFileError) else (str(reason),)
    return (f"is {describe(value)}; {problem['msg'].replace('Input should', 'it must')}",)


def printable(text: str, most: int = 120) -> str:
    """Untrusted text on one line, escaped, truncated after `most` characters."""
    line = text if text.isprintable() else repr(text)
    return line if len(line) <= most else f"{line[:most]}..."


def describe(value: Any) -> str:
    """An untrusted JSON value on one short line."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if type(value) is int and abs(value) >= 10**20:
        return f"an integer of {value.bit_length()} bits"
    return printable(repr(value))
