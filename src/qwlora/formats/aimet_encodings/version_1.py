"""Versions 0.6.1 and 1.0.0: activations and parameters in two sections, no axis, flat lists.

    {version, producer, activation_encodings, param_encodings, excluded_layers, quantizer_args}

In 0.6.1 a section is an object. Under each name is a list with one item per channel, or one for
floats; there are no blocks:

    {min, max, scale, offset, bitwidth, dtype: "int", is_symmetric: "True" | "False"
    [, zero_point_shift]}
    {bitwidth, dtype: "float"}

`min = offset * scale` and `max = (offset + 2^bitwidth - 1) * scale` are redundant: computed when
written, and when read they must agree within half a step. In 1.0.0 a section is a list of entries:

    {name, dtype: "INT", bw, is_sym, enc_type: PER_TENSOR | PER_CHANNEL | PER_BLOCK, scale, offset
    [, block_size][, zero_point_shift]}
    {name, dtype: "INT", bw, compressed_bw, is_sym: true, enc_type: LPBQ, scale, offset, block_size,
    per_block_int_scale}
    {name, dtype: "FLOAT", bw, enc_type: PER_TENSOR}

aimet-torch also writes 0.6.1 by module, for loading it again: `sim.save_encodings_to_json` (no
version), `*_torch.encodings` of `sim.export` (0.6.1 or 1.0.0, whose items are of 0.6.1 all the
same), and the parameters alone after AdaRound and GPTVQ (no activations, no version):

    activation_encodings: {MODULE: {input: {"0": ITEM or [ITEM, ...]}, output: {...}}}
    param_encodings: {MODULE.NAME: [ITEM, ...]}

They are read as 0.6.1, where activations are called MODULE.input.0 and MODULE.output.0.
"""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any, Generic, Literal, TypeVar, cast

import numpy as np
from pydantic import BeforeValidator, PlainValidator

from qwlora.errors import EncodingsFileError
from qwlora.formats.aimet_encodings.json_fields import (
    AsEntry,
    Document,
    FlatIntegers,
    FlatNumbers,
    JsonEntry,
    Name,
    describe,
    printable,
)
from qwlora.formats.aimet_encodings.model import (
    EncodingsFile,
    Entry,
    FloatEncoding,
    Floats,
    IntegerEncoding,
    LpbqEncoding,
)

Section = TypeVar("Section")


def _settings(value: Any) -> dict[str, Any]:
    """A flat object of plain values."""
    if not isinstance(value, dict):
        raise ValueError(f"is {describe(value)}; an object is needed")
    for key, setting in value.items():
        is_plain = isinstance(setting, str | bool | int | float)
        if not is_plain or (isinstance(setting, float) and not isfinite(setting)):
            raise ValueError(
                f"has {describe(setting)} under {printable(key)!r}; a string, a finite number, "
                "true or false is needed"
            )
    return value


def is_by_module(document: dict[str, Any]) -> bool:
    """Whether the activations of a document are listed by module; see above."""
    version, activations = document.get("version"), document.get("activation_encodings", {})
    if not isinstance(document.get("param_encodings"), dict) or not isinstance(activations, dict):
        return False
    is_nested = any(isinstance(value, dict) for value in activations.values())
    return "version" not in document or version == "1.0.0" or (version == "0.6.1" and is_nested)


def without_modules(document: dict[str, Any]) -> dict[str, Any]:
    """A document by module as one of 0.6.1.

    Raises:
        EncodingsFileError: the first module that is not described by inputs and outputs.
    """
    activations = {}
    for module, sides in document.get("activation_encodings", {}).items():
        is_nested = isinstance(sides, dict) and all(isinstance(v, dict) for v in sides.values())
        if not is_nested or not sides.keys() <= {"input", "output"}:
            problem = f"is {describe(sides)}; a module has objects input and output here"
            raise EncodingsFileError(module, [problem])
        for side, values in sides.items():
            for index, items in values.items():
                entry = items if isinstance(items, list) else [items]
                activations[f"{module}.{side}.{index}"] = entry
    implied = {"producer": {"package": "aimet-torch"}}
    return implied | document | {"version": "0.6.1", "activation_encodings": activations}


class SectionsDocument(Document, Generic[Section]):
    """0.6.1 and 1.0.0, by the JSON of a section."""

    activation_encodings: Section
    param_encodings: Section
    excluded_layers: list[Name] | None = None
    quantizer_args: Annotated[dict[str, Any] | None, PlainValidator(_settings)] = None

    def content(self) -> EncodingsFile:
        activations, parameters = cast(Any, (self.activation_encodings, self.param_encodings))
        return EncodingsFile(
            self.version,
            (*activations, *parameters),
            frozenset(entry.name for entry in parameters),
            None if self.excluded_layers is None else tuple(self.excluded_layers),
            self.quantizer_args,
            self.producer,  # type: ignore[arg-type]
        )

    @classmethod
    def sections_of(cls, file: EncodingsFile) -> dict[str, Any]:
        sections: dict[str, list[Entry]] = {"activation_encodings": [], "param_encodings": []}
        for entry in file.encodings:
            is_parameter = entry.name in (file.parameters or ())
            sections["param_encodings" if is_parameter else "activation_encodings"].append(entry)
        if file.version == "0.6.1":
            return {key: {e.name: _items(e) for e in entries} for key, entries in sections.items()}
        return {key: [json_of(e) for e in entries] for key, entries in sections.items()}


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


Section061 = Annotated[list[Annotated[Entry061, AsEntry]], BeforeValidator(_by_field)]


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


_GRID = {"is_sym", "scale", "offset"}
_FIELDS = {
    "PER_TENSOR": _GRID,
    "PER_CHANNEL": _GRID,
    "PER_BLOCK": {*_GRID, "block_size"},
    "LPBQ": {*_GRID, "block_size", "compressed_bw", "per_block_int_scale"},
}


class Entry100(JsonEntry):
    """An entry of any kind; `_FIELDS` has the fields of each."""

    dtype: Literal["INT", "FLOAT"]
    bw: int
    enc_type: Literal["PER_TENSOR", "PER_CHANNEL", "PER_BLOCK", "LPBQ"]
    is_sym: bool = False
    scale: FlatNumbers = None
    offset: FlatIntegers = None
    zero_point_shift: FlatNumbers = None
    block_size: int | None = None
    compressed_bw: int = 0
    per_block_int_scale: FlatIntegers = None

    def entry(self) -> Entry:
        always, scale, offset = {"dtype", "bw", "enc_type"}, self.scale, self.offset
        if self.dtype == "FLOAT":
            self.check_fields(always)
            return FloatEncoding(self.name, self.bw)
        optional = set() if self.enc_type == "LPBQ" else {"zero_point_shift"}
        self.check_fields(always | _FIELDS[self.enc_type], optional)
        if scale.size != offset.size:
            raise ValueError(f"offset has {offset.size} values, but scale has {scale.size}")
        if self.enc_type == "LPBQ":
            center = -(2 ** (self.bw - 1))
            if not self.is_sym or (offset != center).any():
                raise ValueError(f"LPBQ is symmetric: is_sym is true, and each offset {center}")
            blocks, size = self.per_block_int_scale, self.block_size or 0
            return LpbqEncoding(self.name, self.compressed_bw, size, blocks, scale, self.bw)
        if self.enc_type == "PER_TENSOR":
            if scale.size != 1:
                raise ValueError(f"scale has {scale.size} values; PER_TENSOR has one")
            scale, offset = scale.reshape(()), offset.reshape(())
        shift = np.zeros(scale.shape) if self.zero_point_shift is None else self.zero_point_shift
        if shift.size != scale.size or (shift != shift.flat[0]).any():
            raise ValueError("zero_point_shift must be a list as long as scale, of equal values")
        return IntegerEncoding(
            self.name,
            self.bw,
            scale,
            offset,
            self.is_sym,
            block_size=self.block_size,
            zero_point_shift=float(shift.flat[0]),
        )


Section100 = list[Annotated[Entry100, AsEntry]]


def json_of(encoding: Entry) -> dict[str, Any]:
    """The JSON of an entry."""
    entry = {"name": encoding.name, "dtype": "INT", "bw": encoding.bitwidth}
    if isinstance(encoding, FloatEncoding):
        return entry | {"dtype": "FLOAT", "enc_type": "PER_TENSOR"}
    if isinstance(encoding, LpbqEncoding):
        decompressed = encoding.decompressed_bitwidth
        assert decompressed is not None, "convert requires it"
        return entry | {
            "bw": decompressed,
            "is_sym": True,
            "enc_type": "LPBQ",
            "scale": encoding.channel_scale.tolist(),
            "offset": [-(2 ** (decompressed - 1))] * encoding.channel_scale.size,
            "block_size": encoding.block_size,
            "compressed_bw": encoding.bitwidth,
            "per_block_int_scale": encoding.block_scale.tolist(),
        }
    entry |= {
        "is_sym": encoding.symmetric,
        "enc_type": f"PER_{encoding.granularity.upper()}",
        "scale": encoding.scale.reshape(-1).tolist(),
        "offset": encoding.offset.reshape(-1).tolist(),
    }
    if encoding.block_size is not None:
        entry["block_size"] = encoding.block_size
    if encoding.zero_point_shift:
        entry["zero_point_shift"] = [encoding.zero_point_shift] * encoding.scale.size
    return entry
