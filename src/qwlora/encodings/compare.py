"""Differences between two encodings files of any versions.

Scales are compared with a relative tolerance, everything else exactly. Not differences: fields that
one version does not have (an axis, a section), the version, the producer. Flat scales are compared
with nested ones in order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from qwlora.encodings.json_fields import printable
from qwlora.encodings.model import Encoding, EncodingsFile


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
    found: list[Difference] = []
    first, second = a.by_name, b.by_name
    for name, encoding in first.items():
        if name in second:
            found += encoding_differences(encoding, second[name], tolerance)
            found += _section_difference(name, a, b)
        else:
            found.append(Difference(name, "only in the first"))
    found += [Difference(name, "only in the second") for name in second if name not in first]
    for field in ("excluded_layers", "quantizer_args"):
        left, right = getattr(a, field), getattr(b, field)
        if left is not None and right is not None and left != right:
            found.append(Difference("file", field, printable(repr(left)), printable(repr(right))))
    return found


def encoding_differences(
    a: Encoding, b: Encoding, tolerance: float = 0.0, unknown_differs: bool = False
) -> list[Difference]:
    """The fields in which two encodings differ.

    Args:
        unknown_differs: also report fields that only one has, and equal values in other shapes.
    """
    if type(a) is not type(b):
        return [Difference(a.name, "kind", _kind(a), _kind(b))]
    if a.granularity != b.granularity:
        return [Difference(a.name, "granularity", a.granularity, b.granularity)]
    found = []
    for field in (f.name for f in fields(a)):
        left, right = getattr(a, field), getattr(b, field)
        if (left is None or right is None) and not unknown_differs:
            continue
        if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
            difference = _array_difference(a.name, field, left, right, tolerance, unknown_differs)
        else:
            equal = type(left) is type(right) and left == right
            difference = None if equal else Difference(a.name, field, _said(left), _said(right))
        found += [] if difference is None else [difference]
    return found


def _array_difference(
    name: str, field: str, a: Any, b: Any, tolerance: float, strict: bool
) -> Difference | None:
    flat = not strict and a.size == b.size and 1 in (a.ndim, b.ndim)
    if a.shape != b.shape and not flat:
        return Difference(name, field, f"shape {list(a.shape)}", f"shape {list(b.shape)}")
    left, right = a.reshape(-1), b.reshape(-1)
    if a.dtype.kind == "i":
        unequal = left != right
        relative = None
    else:
        distance = np.abs(left - right) / np.maximum(np.abs(left), np.abs(right))
        unequal, relative = distance > tolerance, float(distance.max())
    if not unequal.any():
        return None
    i, more = int(unequal.argmax()), int(unequal.sum()) - 1
    where = f" at {i}" if left.size > 1 else ""
    where += f", and {more} more" if more else ""
    return Difference(name, field, f"{left[i]}{where}", str(right[i]), relative)


def _section_difference(name: str, a: EncodingsFile, b: EncodingsFile) -> list[Difference]:
    if (
        a.parameters is None
        or b.parameters is None
        or (name in a.parameters) == (name in b.parameters)
    ):
        return []
    first, second = (
        "a parameter" if name in f else "an activation" for f in (a.parameters, b.parameters)
    )
    return [Difference(name, "section", first, second)]


def _kind(encoding: Encoding) -> str:
    return type(encoding).__name__.removesuffix("Encoding")


def _said(value: Any) -> str:
    return "not said" if value is None else str(value)
