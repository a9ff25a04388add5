"""Arrays from nested lists of untrusted JSON, and the settings of the pydantic models.

Time and memory are proportional to the file: nothing is broadcast or expanded, and arrays have at
most `MAX_RANK` axes.
"""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from qwlora.encodings.findings import describe
from qwlora.encodings.model import Floats, Integers

MAX_RANK = 8
MAX_INTEGER = 2**40  # larger than any code or offset, far below the end of int64


class Strict(BaseModel):
    """A JSON object with exactly these fields, of exactly these types."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def numbers_of(value: Any) -> Floats:
    """Finite numbers: one, a list, or nested lists of equal lengths."""
    items, shape = _rectangle(value)
    if not set(map(type, items)) <= {int, float}:
        wrong = next(item for item in items if type(item) not in (int, float))
        raise ValueError(f"contains {describe(wrong)}; numbers are needed")
    try:
        numbers = np.array(items, dtype=np.float64)
    except OverflowError:
        raise ValueError("contains an integer that is too large for a float") from None
    bad = ~np.isfinite(numbers)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {numbers.size} values are not finite, the first is "
            f"{numbers[bad][0]}"
        )
    return numbers.reshape(shape)


def integers_of(value: Any) -> Integers:
    """Integers of at most `MAX_INTEGER`: one, a list, or nested lists of equal lengths."""
    items, shape = _rectangle(value)
    if set(map(type, items)) != {int}:
        wrong = next(item for item in items if type(item) is not int)
        raise ValueError(f"contains {describe(wrong)}; integers are needed")
    for extreme in (min(items), max(items)):
        if abs(extreme) > MAX_INTEGER:
            raise ValueError(f"contains {describe(extreme)}; the limit is {MAX_INTEGER}")
    return np.array(items, dtype=np.int64).reshape(shape)


def _rectangle(value: Any) -> tuple[list[Any], tuple[int, ...]]:
    """The leaves of nested lists of equal lengths, and those lengths."""
    items: list[Any] = [value]
    shape: list[int] = []
    while isinstance(items[0], list):
        length = len(items[0])
        if not all(isinstance(item, list) and len(item) == length for item in items):
            raise ValueError("contains lists of different lengths, or lists and numbers")
        if not length:
            raise ValueError("is empty")
        if len(shape) == MAX_RANK:
            raise ValueError(f"is nested deeper than {MAX_RANK} lists")
        shape.append(length)
        items = list(chain.from_iterable(items))
    return items, tuple(shape)


def _flat(array: Any) -> Any:
    if array.ndim != 1:
        raise ValueError(f"has {array.ndim} axes; this version has one flat list")
    return array


Name = Annotated[str, Field(min_length=1)]
NestedNumbers = Annotated[Any, PlainValidator(numbers_of)]
NestedIntegers = Annotated[Any, PlainValidator(integers_of)]
FlatNumbers = Annotated[Any, PlainValidator(lambda value: _flat(numbers_of(value)))]
FlatIntegers = Annotated[Any, PlainValidator(lambda value: _flat(integers_of(value)))]
