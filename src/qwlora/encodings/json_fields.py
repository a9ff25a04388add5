"""Reading fields of untrusted JSON: each `Record` method returns the value or None, and notes what is wrong, so that one reading finds everything.

Time and memory are proportional to the file: nothing here is broadcast, repeated or expanded. Arrays have at most `MAX_RANK` axes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, TypeVar

import numpy as np

from qwlora.encodings.model import MAX_BITWIDTH, Floats, Integers

MAX_RANK = 8
MAX_SCALE = float(np.finfo(np.float32).max)  # every runtime keeps scales in float32, or less
MAX_INTEGER = 2**40  # far beyond any code or offset, well inside int64

T = TypeVar("T")
Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (`error`) or odd (`warning`) with a file: in which encoding (or part of the file), in which field, and what."""

    severity: Severity
    where: str
    field: str
    message: str

    def __str__(self) -> str:
        return (
            f"{shown(self.where)}{f', {shown(self.field)}' if self.field else ''}: {self.message}"
        )


class FieldError(Exception):
    """A value is not what it should be; the text says what was found and what is asked. Never leaves this package."""


def shown(text: str, most: int = 120) -> str:
    """Untrusted text on one line, control signs escaped, cut where it is long."""
    line = text if text.isprintable() else repr(text)
    return line if len(line) <= most else f"{line[:most]}..."


def found(value: Any) -> str:
    """An untrusted JSON value on one short line."""
    if isinstance(value, list | dict):
        return _kind(value)
    return number_shown(value) if type(value) is int else shown(repr(value))


@dataclass
class Record:
    """A JSON object under reading. `close` reports the fields that nobody asked for."""

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
        """Note that something is wrong with `key`."""
        self.findings.append(
            Finding(
                "error", self.where, self.prefix + key if key else self.prefix.rstrip("."), message
            )
        )

    def has(self, key: str) -> bool:
        """Whether the field is there."""
        return key in self.values

    def value(self, key: str, required: bool = True) -> Any:
        """The field as it is; None, and noted, when it is missing."""
        self.asked.add(key)
        if key not in self.values and required:
            self.error(key, "is missing")
        return self.values.get(key)

    def text(self, key: str, allowed: Collection[str] = ()) -> str | None:
        """A non-empty string, one of `allowed` where that is given."""
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
        """Positive finite numbers: one, a list, or lists of equal length in lists."""
        return self._checked(key, scales_of)

    def integers(self, key: str, low: int = -MAX_INTEGER) -> Integers | None:
        """Integers not below `low`: one, a list, or lists of equal length in lists."""
        return self._checked(key, lambda value: integers_of(value, low))

    def flat(self, key: str, array: Any) -> None:
        """Note an `array` that is not one plain list."""
        if array is not None and array.ndim != 1:
            self.error(key, f"has {array.ndim} axes; this version writes one plain list")

    def record(self, key: str) -> Record | None:
        """An object inside this one."""
        value = self.value(key)
        return (
            Record(value, self.where, self.findings, f"{self.prefix}{key}.")
            if key in self.values
            else None
        )

    def close(self) -> None:
        """Note every field that was not asked for."""
        for key in self.values.keys() - self.asked:
            self.error(shown(key), "is not a field of this entry in this version")

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
    """A non-empty string, one of `allowed` where that is given."""
    if not isinstance(value, str) or not value:
        raise FieldError(f"is {found(value)}; a non-empty string is needed")
    if allowed and value not in allowed:
        raise FieldError(f"is {found(value)}; one of {', '.join(allowed)} is needed")
    return value


def integer_of(value: Any, low: int, high: int = MAX_INTEGER) -> int:
    """An integer in `[low, high]`."""
    if type(value) is not int:
        raise FieldError(f"is {found(value)}; an integer is needed")
    if not low <= value <= high:
        raise FieldError(f"is {number_shown(value)}; an integer from {low} to {high} is needed")
    return value


def boolean_of(value: Any) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise FieldError(f"is {found(value)}; true or false is needed")
    return value


def scales_of(value: Any) -> Floats:
    """Positive numbers that float32 can hold."""
    numbers = numbers_of(value)
    bad = ~((numbers > 0) & (numbers <= MAX_SCALE))
    if bad.any():
        raise FieldError(
            f"must be above 0 and at most {MAX_SCALE:.3g}; {int(bad.sum())} of {numbers.size} values are not, the first is {numbers[bad][0]}"
        )
    return numbers


def numbers_of(value: Any) -> Floats:
    """Finite numbers."""
    items, shape = _rectangle(value)
    if not set(map(type, items)) <= {int, float}:
        raise FieldError(
            f"holds {_kind(next(i for i in items if type(i) not in (int, float)))}; numbers are needed"
        )
    try:
        numbers = np.array(items, dtype=np.float64)
    except OverflowError:
        raise FieldError("holds an integer that no float can hold") from None
    bad = ~np.isfinite(numbers)
    if bad.any():
        raise FieldError(
            f"{int(bad.sum())} of {numbers.size} values are not finite, the first is {numbers[bad][0]}"
        )
    return numbers.reshape(shape)


def integers_of(value: Any, low: int = -MAX_INTEGER) -> Integers:
    """Integers not below `low`."""
    items, shape = _rectangle(value)
    if set(map(type, items)) != {int}:
        raise FieldError(
            f"holds {found(next(i for i in items if type(i) is not int))}; integers are needed"
        )
    for extreme in (min(items), max(items)):
        integer_of(extreme, low)
    return np.array(items, dtype=np.int64).reshape(shape)


def number_shown(value: int) -> str:
    """An integer of any length on one short line."""
    return str(value) if abs(value) < 10**20 else f"an integer of {value.bit_length()} bits"


def all_equal(items: Iterable[T]) -> bool:
    """Whether every item equals the first, in type too: 1 is not True."""
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
            raise FieldError("holds lists of different lengths, or numbers beside lists")
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
