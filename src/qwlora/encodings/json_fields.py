"""Read fields of untrusted JSON and collect every problem in one pass.

Each method of `Record` returns a value, or None after adding a finding. Time and memory are
proportional to the file: nothing is broadcast or expanded, and arrays have at most `MAX_RANK` axes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, TypeVar

import numpy as np

from qwlora.encodings.model import MAX_BITWIDTH, Floats, Integers

MAX_RANK = 8
MAX_SCALE = float(np.finfo(np.float32).max)  # runtimes store scales in float32 at most
MAX_INTEGER = 2**40  # larger than any code or offset, far below the end of int64

T = TypeVar("T")
Severity = Literal["error", "warning"]


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
        place = (
            f"{printable(self.where)}, {printable(self.field)}"
            if self.field
            else printable(self.where)
        )
        return f"{place}: {self.message}"


class FieldError(Exception):
    """A value is invalid: what was found and what is needed. Never leaves this package."""


def printable(text: str, most: int = 120) -> str:
    """Untrusted text on one line, escaped, truncated after `most` characters."""
    line = text if text.isprintable() else repr(text)
    return line if len(line) <= most else f"{line[:most]}..."


def describe(value: Any) -> str:
    """An untrusted JSON value on one short line."""
    if isinstance(value, list | dict):
        return _kind(value)
    return describe_integer(value) if type(value) is int else printable(repr(value))


@dataclass
class Record:
    """A JSON object. `close` reports the fields that were not read."""

    values: Any
    where: str
    findings: list[Finding]
    prefix: str = ""
    asked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not isinstance(self.values, dict):
            self.error("", f"is {_kind(self.values)}; an object is needed")
            self.values = {}

    def error(self, key: str, message: str) -> None:
        """Add a finding about `key`."""
        self.findings.append(
            Finding(
                "error", self.where, self.prefix + key if key else self.prefix.rstrip("."), message
            )
        )

    def has(self, key: str) -> bool:
        """Whether the field exists."""
        return key in self.values

    def value(self, key: str, required: bool = True) -> Any:
        """The field as it is; None, with a finding, if it is missing."""
        self.asked.add(key)
        if key not in self.values and required:
            self.error(key, "is missing")
        return self.values.get(key)

    def text(self, key: str, allowed: Collection[str] = ()) -> str | None:
        """A non-empty string, one of `allowed` unless that is empty."""
        return self._checked(key, lambda value: text_of(value, allowed))

    def integer(self, key: str, low: int, high: int = MAX_INTEGER) -> int | None:
        """An integer in `[low, high]`."""
        return self._checked(key, lambda value: integer_of(value, low, high))

    def bitwidth(self, key: str) -> int | None:
        """A bitwidth."""
        return self.integer(key, 1, MAX_BITWIDTH)

    def boolean(self, key: str) -> bool | None:
        """True or false."""
        return self._checked(key, boolean_of)

    def scales(self, key: str) -> Floats | None:
        """Positive finite numbers: one, a list, or nested lists of equal lengths."""
        return self._checked(key, scales_of)

    def integers(self, key: str, low: int = -MAX_INTEGER) -> Integers | None:
        """Integers of at least `low`: one, a list, or nested lists of equal lengths."""
        return self._checked(key, lambda value: integers_of(value, low))

    def flat(self, key: str, array: Any) -> None:
        """Add a finding if `array` is not one flat list."""
        if array is not None and array.ndim != 1:
            self.error(key, f"has {array.ndim} axes; this version has one flat list")

    def record(self, key: str) -> Record | None:
        """A nested object."""
        value = self.value(key)
        return (
            Record(value, self.where, self.findings, f"{self.prefix}{key}.")
            if key in self.values
            else None
        )

    def close(self) -> None:
        """Add a finding for every field that was not read."""
        for key in self.values.keys() - self.asked:
            self.error(printable(key), "is not a field of this entry in this version")

    def _checked(self, key: str, check: Any) -> Any:
        value = self.value(key)
        if key not in self.values:
            return None
        try:
            return check(value)
        except FieldError as error:
            self.error(key, str(error))
            return None


def text_of(value: Any, allowed: Collection[str] = ()) -> str:
    """A non-empty string, one of `allowed` unless that is empty."""
    if not isinstance(value, str) or not value:
        raise FieldError(f"is {describe(value)}; a non-empty string is needed")
    if allowed and value not in allowed:
        raise FieldError(f"is {describe(value)}; one of {', '.join(allowed)} is needed")
    return value


def integer_of(value: Any, low: int, high: int = MAX_INTEGER) -> int:
    """An integer in `[low, high]`."""
    if type(value) is not int:
        raise FieldError(f"is {describe(value)}; an integer is needed")
    if not low <= value <= high:
        raise FieldError(f"is {describe_integer(value)}; an integer from {low} to {high} is needed")
    return value


def boolean_of(value: Any) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise FieldError(f"is {describe(value)}; true or false is needed")
    return value


def scales_of(value: Any) -> Floats:
    """Positive numbers that float32 can hold."""
    numbers = numbers_of(value)
    bad = ~((numbers > 0) & (numbers <= MAX_SCALE))
    if bad.any():
        raise FieldError(
            f"must be above 0 and at most {MAX_SCALE:.3g}; {int(bad.sum())} of {numbers.size} "
            f"values are not, the first is {numbers[bad][0]}"
        )
    return numbers


def numbers_of(value: Any) -> Floats:
    """Finite numbers."""
    items, shape = _rectangle(value)
    if not set(map(type, items)) <= {int, float}:
        raise FieldError(
            f"contains {_kind(next(i for i in items if type(i) not in (int, float)))}; "
            "numbers are needed"
        )
    try:
        numbers = np.array(items, dtype=np.float64)
    except OverflowError:
        raise FieldError("contains an integer that is too large for a float") from None
    bad = ~np.isfinite(numbers)
    if bad.any():
        raise FieldError(
            f"{int(bad.sum())} of {numbers.size} values are not finite, the first is "
            f"{numbers[bad][0]}"
        )
    return numbers.reshape(shape)


def integers_of(value: Any, low: int = -MAX_INTEGER) -> Integers:
    """Integers of at least `low`."""
    items, shape = _rectangle(value)
    if set(map(type, items)) != {int}:
        raise FieldError(
            f"contains {describe(next(i for i in items if type(i) is not int))}; integers are "
            "needed"
        )
    for extreme in (min(items), max(items)):
        integer_of(extreme, low)
    return np.array(items, dtype=np.int64).reshape(shape)


def describe_integer(value: int) -> str:
    """An integer of any length on one short line."""
    return str(value) if abs(value) < 10**20 else f"an integer of {value.bit_length()} bits"


def all_equal(items: Iterable[T]) -> bool:
    """Whether every item equals the first, and has its type: 1 is not True."""
    iterator = iter(items)
    first = next(iterator, None)
    return all(type(item) is type(first) and item == first for item in iterator)


def _rectangle(value: Any) -> tuple[list[Any], tuple[int, ...]]:
    """The leaves of nested lists of equal lengths, and those lengths."""
    items: list[Any] = [value]
    shape: list[int] = []
    while isinstance(items[0], list):
        length = len(items[0])
        if not all(isinstance(item, list) and len(item) == length for item in items):
            raise FieldError("contains lists of different lengths, or lists and numbers")
        if not length:
            raise FieldError("is empty")
        if len(shape) == MAX_RANK:
            raise FieldError(f"is nested deeper than {MAX_RANK} lists")
        shape.append(length)
        items = list(chain.from_iterable(items))
    return items, tuple(shape)


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        type(None): "null",
        int: "an integer",
        float: "a number",
    }
    return names[type(value)]
