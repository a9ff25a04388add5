"""Versions 2.0.0 and 2.1.0: one list of encodings, axes, signed or unsigned codes, nested scales.

    {version, producer, encodings: [...]}

Entries:

    integers        {name, output_dtype: "int8" | "uint16" | ..., y_scale[, y_zero_point][, axis]
                    [, block_size]};  real = (q - y_zero_point) * y_scale
    floats          {name, output_dtype: "float8e4m3fn" | ..., y_scale[, axis][, block_size]}
    LPBQ in 2.0.0   {name, output_dtype, per_block_int_scale, per_channel_float_scale, axis,
                    block_size}
    LPBQ in 2.1.0   {name, output_dtype, y_scale: {x, x_scale, axis}, axis, block_size}

`axis` is the channel axis, or the block axis if there is a `block_size`. A `y_zero_point` that is
zero everywhere is omitted; one that ends in .5 is a `zero_point_shift`. Negative axes of nested
scales are accepted (AIMET 2.42 writes -1 next to a positive axis) and made positive.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Discriminator, Field, Tag

from qwlora.formats.aimet_encodings.json_fields import (
    MAX_INTEGER,
    MAX_RANK,
    AsEntry,
    Document,
    FlatNumbers,
    JsonEntry,
    NestedIntegers,
    NestedNumbers,
    Strict,
    printable,
)
from qwlora.formats.aimet_encodings.model import (
    FLOAT_FORMATS,
    MAX_BITWIDTH,
    EncodingsFile,
    Entry,
    FloatEncoding,
    Floats,
    IntegerEncoding,
    Integers,
    LpbqEncoding,
)

Axis = Annotated[int, Field(ge=-MAX_RANK, lt=MAX_RANK)]


def _known_dtype(dtype: str) -> str:
    integer = re.fullmatch("u?int([1-9][0-9]?)", dtype)
    if dtype not in FLOAT_FORMATS and (integer is None or int(integer[1]) > MAX_BITWIDTH):
        raise ValueError(
            f"is {printable(dtype, 40)!r}; int1 to int32, uint1 to uint32 or one of "
            f"{', '.join(FLOAT_FORMATS)} is needed"
        )
    return dtype


class NestedScale(Strict):
    """An integer scale per block with a float scale per channel."""

    x: NestedIntegers
    x_scale: FlatNumbers
    axis: Axis


class Entry2(JsonEntry):
    """An entry of either version."""

    output_dtype: Annotated[str, AfterValidator(_known_dtype)]
    axis: Axis | None = None
    block_size: int | None = None
    y_zero_point: NestedNumbers = None
    y_scale: Annotated[
        Annotated[NestedNumbers, Tag("plain")] | Annotated[NestedScale, Tag("nested")],
        Discriminator(lambda value: "nested" if isinstance(value, dict) else "plain"),
    ] = None
    per_block_int_scale: NestedIntegers = None
    per_channel_float_scale: NestedNumbers = None

    def entry(self) -> Entry:
        if isinstance(self.y_scale, NestedScale):
            self.check_fields({"output_dtype", "axis", "block_size", "y_scale"})
            blocks, channels = self.y_scale.x, self.y_scale.x_scale
            channel = _positive(self.y_scale.axis, blocks.ndim, "y_scale.axis")
            if channels.size != blocks.shape[channel]:
                raise ValueError(
                    f"y_scale.x_scale has {channels.size} values, but axis {self.y_scale.axis} of "
                    f"x has {blocks.shape[channel]}"
                )
            return self._lpbq(blocks, channels.reshape(channel_shape(blocks.ndim, channel)))
        if self.per_block_int_scale is not None:
            scales = {"per_block_int_scale", "per_channel_float_scale"}
            self.check_fields({"output_dtype", "axis", "block_size", *scales})
            return self._lpbq(self.per_block_int_scale, self.per_channel_float_scale)
        self.check_fields({"output_dtype", "y_scale"}, {"axis", "block_size", "y_zero_point"})
        scale, axis, size, dtype = self.y_scale, self.axis, self.block_size, self.output_dtype
        if scale.ndim and axis is None:
            raise ValueError("axis is missing; a y_scale that is a list needs one")
        if axis is not None and size is not None:
            axis = _positive(axis, scale.ndim)
        if dtype in FLOAT_FORMATS:
            if self.y_zero_point is not None:
                raise ValueError("y_zero_point is not a field of floats")
            return FloatEncoding(self.name, FLOAT_FORMATS[dtype], dtype, scale, axis, size)
        signed, bitwidth = _integer_format(dtype)
        center = -(2 ** (bitwidth - 1))
        zero_point = np.zeros(scale.shape) if self.y_zero_point is None else self.y_zero_point
        whole = np.ceil(zero_point)
        shifts = {*(whole - zero_point).reshape(-1).tolist()}
        if shifts not in ({0.0}, {0.5}) or np.abs(whole).max() > MAX_INTEGER:
            raise ValueError(
                f"y_zero_point must hold integers within {MAX_INTEGER}, or integers and a half"
            )
        if zero_point.shape != scale.shape:
            raise ValueError(
                f"y_zero_point has shape {list(zero_point.shape)}, but y_scale {list(scale.shape)}"
            )
        offset = (center if signed else 0) - whole.astype(np.int64)
        symmetric, shift = bool((offset == center).all()), shifts.pop()
        return IntegerEncoding(
            self.name, bitwidth, scale, offset, symmetric, signed, axis, size, shift
        )

    def _lpbq(self, blocks: Integers, channels: Floats) -> Entry:
        signed, bitwidth = _integer_format(self.output_dtype)
        if not signed:
            raise ValueError("output_dtype must be int1 to int32: LPBQ is signed and symmetric")
        axis, size = _positive(self.axis or 0, blocks.ndim), self.block_size or 0
        return LpbqEncoding(self.name, bitwidth, size, blocks, channels, axis=axis)


class Document2(Document):
    """A file of version 2.0.0 or 2.1.0."""

    version: Literal["2.0.0", "2.1.0"]
    encodings: list[Annotated[Entry2, AsEntry]]

    def content(self) -> EncodingsFile:
        entries: Any = self.encodings
        return EncodingsFile(self.version, tuple(entries), producer=self.producer)  # type: ignore[arg-type]

    @classmethod
    def sections_of(cls, file: EncodingsFile) -> dict[str, Any]:
        return {"encodings": [_json_of(encoding, file.version) for encoding in file.encodings]}


def _integer_format(dtype: str) -> tuple[bool, int]:
    """(signed, bitwidth) of int8, uint4 ...; floats count as unsigned."""
    return dtype.startswith("int"), int(re.sub(r"\D+", "", dtype)[:2])


def _positive(axis: int, rank: int, field: str = "axis") -> int:
    if not -rank <= axis < rank:
        raise ValueError(f"{field} is {axis}, outside scales of {rank} axes")
    return axis % rank


def channel_shape(rank: int, channel_axis: int) -> tuple[int, ...]:
    """-1 at the channel axis and 1 at the others: for reshaping one value per channel."""
    return tuple(-1 if axis == channel_axis else 1 for axis in range(rank))


def _json_of(encoding: Entry, version: str) -> dict[str, Any]:
    """The JSON of an entry."""
    entry: dict[str, Any] = {"name": encoding.name}
    if isinstance(encoding, LpbqEncoding):
        blocks, channels = encoding.block_scale.tolist(), encoding.channel_scale
        entry["output_dtype"] = f"int{encoding.bitwidth}"
        if version == "2.0.0":
            entry["per_block_int_scale"] = blocks
            entry["per_channel_float_scale"] = channels.tolist()
        else:
            entry["y_scale"] = {
                "x": blocks,
                "x_scale": channels.reshape(-1).tolist(),
                "axis": encoding.channel_axis,
            }
    else:
        assert encoding.scale is not None, "convert drops floats without a scale"
        scale = {"y_scale": encoding.scale.tolist()}
        if isinstance(encoding, FloatEncoding):
            entry |= {"output_dtype": encoding.format, **scale}
        else:
            sign = "" if encoding.signed else "u"
            entry |= {"output_dtype": f"{sign}int{encoding.bitwidth}", **scale}
            zero_point = (encoding.center if encoding.signed else 0) - encoding.offset
            if shift := encoding.zero_point_shift:
                entry["y_zero_point"] = (zero_point - shift).tolist()
            elif zero_point.any():
                entry["y_zero_point"] = zero_point.tolist()
    entry |= {} if encoding.axis is None else {"axis": encoding.axis}
    return entry | ({} if encoding.block_size is None else {"block_size": encoding.block_size})
