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
from pydantic import BeforeValidator

from qwlora.formats.aimet_encodings.findings import describe
from qwlora.formats.aimet_encodings.json_fields import (
    AsEntry,
    FlatIntegers,
    FlatNumbers,
    JsonEntry,
    SectionsDocument,
)
from qwlora.formats.aimet_encodings.model import (
    Entry,
    FloatEncoding,
    Floats,
    IntegerEncoding,
    LpbqEncoding,
)


class Entry061(JsonEntry):
    """A name, and its items by field: numbers of each channel, and what all channels share."""

    dtype: Literal["int", "float"]
    bitwidth: int
    is_symmetric: Literal["True", "False"] = "False"
    zero_point_shift: float = 0.0
    scale: FlatNumbers = None
    offset: FlatIntegers = None
    min: FlatNumbers = None
    max: FlatNumbers = None

    def entry(self) -> Entry:
        if self.dtype == "float":
            self.check_fields({"dtype", "bitwidth"})
            return FloatEncoding(self.name, self.bitwidth)
        numbers = {"scale", "offset", "min", "max"}
        self.check_fields({"dtype", "bitwidth", "is_symmetric", *numbers}, {"zero_point_shift"})
        shape = () if self.scale.size == 1 else (-1,)
        encoding = IntegerEncoding(
            self.name,
            self.bitwidth,
            self.scale.reshape(shape),
            self.offset.reshape(shape),
            self.is_symmetric == "True",
            zero_point_shift=self.zero_point_shift,
        )
        for key, computed in zip(("min", "max"), _range(encoding), strict=True):
            stated = getattr(self, key)
            tolerance = 0.5 * self.scale + 1e-5 * np.abs(computed)
            off = ~(np.abs(stated - computed) <= tolerance)
            if off.any():
                i = int(off.argmax())
                raise ValueError(
                    f"{key} is {stated[i]} in item {i}, but scale and offset make it {computed[i]}"
                )
        return encoding


def _by_field(section: Any) -> list[dict[str, Any]]:
    if not isinstance(section, dict):
        raise ValueError(f"is {describe(section)}; an object is needed")
    entries = []
    for name, items in section.items():
        entry = {"name": name, "items": items}
        if isinstance(items, list) and all(isinstance(item, dict) for item in items):
            keys = dict.fromkeys(key for item in items for key in item)
            fields: dict[str, Any] = dict.fromkeys(keys)
            for key in keys & Entry061.model_fields.keys():
                fields[key] = [item.get(key) for item in items]
            for key in {"dtype", "bitwidth", "is_symmetric", "zero_point_shift"} & fields.keys():
                if all(value == fields[key][0] for value in fields[key]):
                    fields[key] = fields[key][0]
            entry = {"name": name, **fields}
        entries.append(entry)
    return entries


Section = Annotated[list[Annotated[Entry061, AsEntry]], BeforeValidator(_by_field)]


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
