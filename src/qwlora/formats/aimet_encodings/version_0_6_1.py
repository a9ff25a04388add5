"""Version 0.6.1: an object of entries for activations and one for parameters, no axis, no blocks.

    {version, producer, activation_encodings, param_encodings, excluded_layers, quantizer_args}

Under each name is a list with one item per channel, or one for floats:

    {min, max, scale, offset, bitwidth, dtype: "int", is_symmetric: "True" | "False"
    [, zero_point_shift]}
    {bitwidth, dtype: "float"}

`min = offset * scale` and `max = (offset + 2^bitwidth - 1) * scale` are redundant: computed when
written, and when read they must agree within half a step.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Discriminator, Field, Tag

from qwlora.formats.aimet_encodings.findings import describe
from qwlora.formats.aimet_encodings.json_fields import (
    MAX_INTEGER,
    AsEntry,
    JsonEntry,
    SectionsDocument,
    Strict,
)
from qwlora.formats.aimet_encodings.model import (
    Entry,
    FloatEncoding,
    Floats,
    IntegerEncoding,
    LpbqEncoding,
)


class IntegerItem(Strict):
    """The grid of one channel."""

    min: float
    max: float
    scale: float
    offset: Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]
    bitwidth: int
    dtype: Literal["int"]
    is_symmetric: Literal["True", "False"]
    zero_point_shift: float = 0.0


class FloatItem(Strict):
    """A float without a scale."""

    bitwidth: int
    dtype: Literal["float"]


def _kind(items: Any) -> str:
    match items:
        case [{"dtype": "float"}, *_]:
            return "float"
    return "integer"


class Channels(JsonEntry):
    """A name and its items."""

    items: Annotated[
        Annotated[list[IntegerItem], Tag("integer"), Field(min_length=1)]
        | Annotated[list[FloatItem], Tag("float"), Field(max_length=1)],
        Discriminator(_kind),
    ]

    def entry(self) -> Entry:
        first = self.items[0]
        if isinstance(first, FloatItem):
            return FloatEncoding(self.name, first.bitwidth)
        for key in ("bitwidth", "is_symmetric", "zero_point_shift"):
            if len({getattr(item, key) for item in self.items}) > 1:
                raise ValueError(f"{key} differs among the channels")
        scale, offset, low, high = (
            np.array([getattr(item, key) for item in self.items])
            for key in ("scale", "offset", "min", "max")
        )
        shape = () if len(self.items) == 1 else (len(self.items),)
        encoding = IntegerEncoding(
            self.name,
            first.bitwidth,
            scale.reshape(shape),
            offset.reshape(shape),
            first.is_symmetric == "True",
            zero_point_shift=first.zero_point_shift,
        )
        for key, stated, computed in zip(
            ("min", "max"), (low, high), _range(encoding), strict=True
        ):
            tolerance = 0.5 * scale + 1e-5 * np.abs(computed)
            off = ~(np.abs(stated - computed) <= tolerance)
            if off.any():
                i = int(off.argmax())
                raise ValueError(
                    f"{key} is {stated[i]} in item {i}, but scale and offset make it {computed[i]}"
                )
        return encoding


def _named(section: Any) -> list[dict[str, Any]]:
    if not isinstance(section, dict):
        raise ValueError(f"is {describe(section)}; an object is needed")
    return [{"name": name, "items": items} for name, items in section.items()]


Section = Annotated[list[Annotated[Channels, AsEntry]], BeforeValidator(_named)]


class Document061(SectionsDocument):
    """A file of version 0.6.1."""

    version: Literal["0.6.1"]
    activation_encodings: Section
    param_encodings: Section

    @classmethod
    def section(cls, encodings: list[Entry]) -> Any:
        return {encoding.name: _items(encoding) for encoding in encodings}


def _items(encoding: Entry) -> list[dict[str, Any]]:
    assert not isinstance(encoding, LpbqEncoding), "0.6.1 has no LPBQ; convert leaves none"
    if isinstance(encoding, FloatEncoding):
        return [{"bitwidth": encoding.bitwidth, "dtype": "float"}]
    shared = {
        "bitwidth": encoding.bitwidth,
        "dtype": "int",
        "is_symmetric": str(encoding.symmetric),
    }
    if encoding.zero_point_shift:
        shared["zero_point_shift"] = encoding.zero_point_shift
    columns = (*_range(encoding), encoding.scale.reshape(-1), encoding.offset.reshape(-1))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        {"min": low, "max": high, "scale": scale, "offset": offset, **shared}
        for low, high, scale, offset in rows
    ]


def _range(encoding: IntegerEncoding) -> tuple[Floats, Floats]:
    """Lowest and highest value of each grid; in float32 if the scales are, which is AIMET's way."""
    offset, scale = encoding.offset.reshape(-1), encoding.scale.reshape(-1)
    highest = offset + 2**encoding.bitwidth - 1
    with np.errstate(over="ignore", under="ignore"):
        narrow = scale.astype(np.float32)
        if (narrow == scale).all():
            low, high = (steps.astype(np.float32) * narrow for steps in (offset, highest))
            if np.isfinite(low).all() and np.isfinite(high).all():
                return low.astype(np.float64), high.astype(np.float64)
    return offset * scale, highest * scale
