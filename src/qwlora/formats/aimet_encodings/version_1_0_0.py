"""Version 1.0.0: a list of entries for activations and one for parameters, no axis, flat lists.

    {version, producer, activation_encodings, param_encodings, excluded_layers, quantizer_args}

Entries:

    {name, dtype: "INT", bw, is_sym, enc_type: PER_TENSOR | PER_CHANNEL | PER_BLOCK, scale, offset
    [, block_size][, zero_point_shift]}
    {name, dtype: "INT", bw, compressed_bw, is_sym: true, enc_type: LPBQ, scale, offset, block_size,
    per_block_int_scale}
    {name, dtype: "FLOAT", bw, enc_type: PER_TENSOR}
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np

from qwlora.formats.aimet_encodings.json_fields import (
    AsEntry,
    FlatIntegers,
    FlatNumbers,
    JsonEntry,
    SectionsDocument,
)
from qwlora.formats.aimet_encodings.model import Entry, FloatEncoding, IntegerEncoding, LpbqEncoding

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


class Document100(SectionsDocument):
    """A file of version 1.0.0."""

    version: Literal["1.0.0"]
    activation_encodings: list[Annotated[Entry100, AsEntry]]
    param_encodings: list[Annotated[Entry100, AsEntry]]

    @classmethod
    def section(cls, encodings: list[Entry]) -> Any:
        return [json_of(encoding) for encoding in encodings]


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
