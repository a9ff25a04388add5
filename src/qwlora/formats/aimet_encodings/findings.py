"""Problems of an encodings file, and untrusted text and values on one short line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from qwlora.errors import EncodingsFileError

_VECTOR_FIELDS = {"rows_per_block", "cols_per_block", "vector_dim", "vector_stride", "index_bw"}
_KINDS = {"plain", "nested"}  # in pydantic's paths, not in files


@dataclass(frozen=True)
class Finding:
    """One problem of a file.

    Args:
        severity: `error`: a runtime computes something else, or nothing; `warning`: legal, but
            unusual.
        where: name of the encoding, or the section of the file.
        field: of the encoding, or "".
    """

    severity: Literal["error", "warning"]
    where: str
    field: str
    message: str

    def __str__(self) -> str:
        place = printable(self.where) + (f", {printable(self.field)}" if self.field else "")
        return f"{place}: {self.message}"


def findings_of(error: ValidationError, document: dict[str, Any]) -> Iterator[Finding]:
    """The problems that pydantic found in `document`, by entry and field."""
    for problem in error.errors(include_url=False):
        section, *keys = problem["loc"]
        where = "file"
        if keys and isinstance(keys[0], int):
            # in 0.6.1 the entries of a section are the values of an object, named by their keys
            entry = list(document[str(section)])[keys[0]]
            name = entry.get("name") if isinstance(entry, dict) else entry
            where = name or "''" if isinstance(name, str) else f"{section}[{keys[0]}]"
            keys = keys[1:]
        else:
            keys = [section, *keys]
        field = ".".join(
            f"item {key}" if isinstance(key, int) else key for key in keys if key not in _KINDS
        )
        for message in _messages(dict(problem)):
            yield Finding("error", where, field, message)


def _messages(problem: dict[str, Any]) -> tuple[str, ...]:
    kind, value = problem["type"], problem["input"]
    if value == "VECTOR" or problem["loc"][-1] in _VECTOR_FIELDS:
        return ("is vector quantization, which is not supported",)
    if kind == "missing":
        return ("is missing",)
    if kind == "extra_forbidden":
        return ("is not a field of this entry in this version",)
    if kind == "value_error":
        reason = problem["ctx"]["error"]
        return reason.problems if isinstance(reason, EncodingsFileError) else (str(reason),)
    return (f"is {describe(value)}; {problem['msg'].replace('Input should', 'it must')}",)


def shared_lines(problems: Iterable[tuple[str, str]], what: str = "encodings") -> list[str]:
    """A line for each (name, problem); equal problems of more than three names share one."""
    names_of: dict[str, list[str]] = {}
    for name, problem in problems:
        names_of.setdefault(problem, []).append(printable(name))
    lines = []
    for problem, names in names_of.items():
        if len(names) <= 3:
            lines += [f"{name}: {problem}" for name in names]
        else:
            lines.append(f"{len(names)} {what} ({', '.join(names[:3])} ...): {problem}")
    return lines


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
