"""Differences between two encodings files of any versions.

Scales are compared with a relative tolerance, everything else exactly. Not differences: fields that
one version does not have (an axis, a section), the version, the producer. A flat list of scales
equals a nested one with the same numbers in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from qwlora.formats.aimet_encodings.findings import printable
from qwlora.formats.aimet_encodings.model import EncodingsFile, Entry


@dataclass(frozen=True)
class Difference:
    """One field that differs, or a name that only one file has.

    Args:
        name: of the tensor, or "file".
        field: or "only in the first", "only in the second".
        first, second: both values.
        relative: of scales of equal number, the largest `|a - b| / max(|a|, |b|)`.
    """

    name: str
    field: str
    first: str = ""
    second: str = ""
    relative: float | None = None

    def __str__(self) -> str:
        if self.field.startswith("only in"):
            return f"{printable(self.name)}: {self.field}"
        size = "" if self.relative is None else f" (relative difference {self.relative:.3g})"
        return f"{printable(self.name)}, {self.field}: {self.first} | {self.second}{size}"


def diff(a: EncodingsFile, b: EncodingsFile, tolerance: float = 0.0) -> list[Difference]:
    """Every difference between `a` and `b`, in the order of `a`.

    Args:
        tolerance: relative, for scales.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance {tolerance} is not a number of 0 or more")
    differences: list[Difference] = []
    only_in_b = b.by_name
    for entry in a.encodings:
        if entry.name not in only_in_b:
            differences.append(Difference(entry.name, "only in the first"))
            continue
        differences += encoding_differences(entry, only_in_b.pop(entry.name), tolerance)
        if a.parameters is not None and b.parameters is not None:
            sections = ("an activation", "a parameter")
            first, second = (
                sections[entry.name in names] for names in (a.parameters, b.parameters)
            )
            if first != second:
                differences.append(Difference(entry.name, "section", first, second))
    differences += [Difference(name, "only in the second") for name in only_in_b]
    for field in ("excluded_layers", "quantizer_args"):
        values = getattr(a, field), getattr(b, field)
        if None not in values and values[0] != values[1]:
            first, second = (printable(repr(value)) for value in values)
            differences.append(Difference("file", field, first, second))
    return differences


def encoding_differences(
    a: Entry, b: Entry, tolerance: float = 0.0, unknown_differs: bool = False
) -> list[Difference]:
    """The fields in which two encodings differ.

    Args:
        unknown_differs: also report fields that only one has, and equal values in other shapes.
    """
    if type(a) is not type(b):
        first, second = (type(entry).__name__.removesuffix("Encoding") for entry in (a, b))
        return [Difference(a.name, "kind", first, second)]
    if a.granularity != b.granularity:
        return [Difference(a.name, "granularity", a.granularity, b.granularity)]
    differences = []
    for field in (f.name for f in fields(a)):
        values = getattr(a, field), getattr(b, field)
        if isinstance(values[0], np.ndarray) and isinstance(values[1], np.ndarray):
            texts = _array_difference(*values, tolerance, unknown_differs)
            differences += [Difference(a.name, field, *texts)] if texts else []
        elif values[0] != values[1] and (unknown_differs or None not in values):
            first, second = ("not said" if value is None else str(value) for value in values)
            differences.append(Difference(a.name, field, first, second))
    return differences


def _array_difference(a: Any, b: Any, tolerance: float, strict: bool) -> tuple[Any, ...] | None:
    """The first values that differ as texts, and the largest relative difference of scales."""
    if a.shape != b.shape and (strict or a.size != b.size or 1 not in (a.ndim, b.ndim)):
        return f"shape {list(a.shape)}", f"shape {list(b.shape)}"
    left, right = a.reshape(-1), b.reshape(-1)
    relative, unequal = None, left != right
    if a.dtype.kind == "f":
        distance = np.abs(left - right) / np.maximum(np.abs(left), np.abs(right))
        unequal, relative = distance > tolerance, float(distance.max())
    if not unequal.any():
        return None
    i, more = int(unequal.argmax()), int(unequal.sum()) - 1
    where = f" at {i}" if left.size > 1 else ""
    return f"{left[i]}{where}{f', and {more} more' if more else ''}", str(right[i]), relative
