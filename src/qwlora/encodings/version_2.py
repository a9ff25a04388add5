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
from typing import Any

import numpy as np

from qwlora.encodings.json_fields import MAX_INTEGER, MAX_RANK, FieldError, Record, numbers_of
from qwlora.encodings.model import (
    FLOAT_FORMATS,
    MAX_BITWIDTH,
    Encoding,
    FloatEncoding,
    Floats,
    IntegerEncoding,
    Integers,
    LpbqEncoding,
)


def parse_2(record: Record, version: str) -> Encoding | None:
    """The entry's encoding; None, with a finding, if it is malformed."""
    name, dtype = record.text("name"), record.text("output_dtype")
    if name is None or dtype is None:
        return None
    integer = re.fullmatch(r"(u?)int([1-9][0-9]?)", dtype)
    if dtype not in FLOAT_FORMATS and (integer is None or int(integer[2]) > MAX_BITWIDTH):
        record.error(
            "output_dtype",
            f"is {dtype[:40]!r}; int1 to int32, uint1 to uint32 or one of "
            f"{', '.join(FLOAT_FORMATS)} is needed",
        )
        return None
    nested = isinstance(record.values.get("y_scale"), dict)
    if integer is None:
        return _parse_float(name, dtype, record, nested)
    signed, bitwidth = not integer[1], int(integer[2])
    if record.has("per_block_int_scale") or nested:
        return _parse_lpbq(name, bitwidth, signed, record, version)
    return _parse_integer(name, bitwidth, signed, record)


def _parse_integer(name: str, bitwidth: int, signed: bool, record: Record) -> Encoding | None:
    scale, axis, block_size = _grid(record)
    offset, shift = _offset(record, scale, bitwidth, signed)
    record.close()
    if scale is None or offset is None or (scale.ndim and axis is None):
        return None
    symmetric = bool((offset == -(2 ** (bitwidth - 1))).all())
    return IntegerEncoding(
        name, bitwidth, scale, offset, symmetric, signed, axis, block_size, shift
    )


def _parse_float(name: str, dtype: str, record: Record, nested: bool) -> Encoding | None:
    if nested:
        record.error(
            "y_scale",
            "is a scale of floats with a scale of its own (NVFP4), which is not supported",
        )
        return None
    scale, axis, block_size = _grid(record)
    record.close()
    if scale is None or (scale.ndim and axis is None):
        return None
    return FloatEncoding(name, FLOAT_FORMATS[dtype], dtype, scale, axis, block_size)


def _grid(record: Record) -> tuple[Floats | None, int | None, int | None]:
    """Scale, axis and block size, if they are consistent."""
    scale = record.scales("y_scale")
    axis = record.integer("axis", -MAX_RANK, MAX_RANK - 1) if record.has("axis") else None
    block_size = record.integer("block_size", 1) if record.has("block_size") else None
    if (
        scale is None
        or (record.has("axis") and axis is None)
        or (record.has("block_size") and block_size is None)
    ):
        return None, None, None
    if scale.ndim and axis is None:
        record.error("axis", "is missing; a y_scale that is a list needs one")
    if not scale.ndim and (axis is not None or block_size is not None):
        record.error("y_scale", "is one number; with an axis or a block_size it must be a list")
        return None, None, None
    if block_size is None and scale.ndim > 1:
        record.error(
            "y_scale",
            f"has {scale.ndim} axes; without a block_size it is one number or one plain list",
        )
        return None, None, None
    if block_size is not None and axis is not None:
        axis = _positive_axis(record, "axis", axis, scale.ndim)
    return scale, axis, block_size


def _positive_axis(record: Record, key: str, axis: int, rank: int) -> int | None:
    if not -rank <= axis < rank:
        record.error(key, f"is {axis}, outside scales of {rank} axes")
        return None
    return axis % rank


def _offset(
    record: Record, scale: Floats | None, bitwidth: int, signed: bool
) -> tuple[Integers | None, float]:
    """`y_zero_point` as an offset of unsigned codes, and the zero point shift."""
    lowest = -(2 ** (bitwidth - 1)) if signed else 0
    if not record.has("y_zero_point"):
        return (np.full(scale.shape, lowest), 0.0) if scale is not None else (None, 0.0)
    try:
        zero_point = numbers_of(record.value("y_zero_point"))
    except FieldError as error:
        record.error("y_zero_point", str(error))
        return None, 0.0
    fraction = (np.ceil(zero_point) - zero_point).reshape(-1)
    if (
        not ((fraction == 0).all() or (fraction == 0.5).all())
        or np.abs(zero_point).max() > MAX_INTEGER
    ):
        record.error(
            "y_zero_point", f"must hold integers within {MAX_INTEGER}, or integers and a half"
        )
        return None, 0.0
    if scale is not None and zero_point.shape != scale.shape:
        record.error(
            "y_zero_point", f"has shape {list(zero_point.shape)}, but y_scale {list(scale.shape)}"
        )
        return None, 0.0
    return lowest - np.ceil(zero_point).astype(np.int64), float(fraction[0])


def _parse_lpbq(
    name: str, bitwidth: int, signed: bool, record: Record, version: str
) -> Encoding | None:
    if record.has("per_block_int_scale") and version != "2.0.0":
        record.error(
            "per_block_int_scale",
            f"is how 2.0.0 writes LPBQ; {version} has y_scale.x and y_scale.x_scale",
        )
        return None
    if not record.has("per_block_int_scale") and version == "2.0.0":
        record.error(
            "y_scale",
            "is an object, which is how 2.1.0 writes LPBQ; 2.0.0 has per_block_int_scale and "
            "per_channel_float_scale",
        )
        return None
    if not signed:
        record.error("output_dtype", "is unsigned; LPBQ is signed and symmetric")
    axis, block_size = (
        record.integer("axis", -MAX_RANK, MAX_RANK - 1),
        record.integer("block_size", 1),
    )
    block_scale, channel_scale, channel_axis = (
        _scales_2_0_0 if version == "2.0.0" else _scales_2_1_0
    )(record)
    record.close()
    if block_scale is None or channel_scale is None or axis is None or block_size is None:
        return None
    axis = _positive_axis(record, "axis", axis, block_scale.ndim)
    if axis is not None and channel_axis is None:
        channel_axis = channel_axis_of(channel_scale.shape, axis)
    return (
        LpbqEncoding(
            name, bitwidth, block_size, block_scale, channel_scale, None, axis, channel_axis
        )
        if axis is not None
        else None
    )


def _scales_2_0_0(record: Record) -> tuple[Integers | None, Floats | None, int | None]:
    block_scale, channel_scale = (
        record.integers("per_block_int_scale", 1),
        record.scales("per_channel_float_scale"),
    )
    if block_scale is None or channel_scale is None:
        return None, None, None
    fits = block_scale.ndim == channel_scale.ndim > 0 and all(
        b % c == 0 for b, c in zip(block_scale.shape, channel_scale.shape, strict=True)
    )
    if not fits:
        found = (
            f"has shape {list(channel_scale.shape)}, which does not divide that of "
            f"per_block_int_scale, {list(block_scale.shape)}"
        )
        record.error("per_channel_float_scale", found)
        return None, None, None
    return block_scale, channel_scale, None


def _scales_2_1_0(record: Record) -> tuple[Integers | None, Floats | None, int | None]:
    inner = record.record("y_scale")
    if inner is None:
        return None, None, None
    block_scale, channel_scale, axis = (
        inner.integers("x", 1),
        inner.scales("x_scale"),
        inner.integer("axis", -MAX_RANK, MAX_RANK - 1),
    )
    inner.flat("x_scale", channel_scale)
    inner.close()
    if block_scale is None or channel_scale is None or axis is None or channel_scale.ndim != 1:
        return None, None, None
    channel_axis = _positive_axis(inner, "axis", axis, block_scale.ndim)
    if channel_axis is None:
        return None, None, None
    if channel_scale.size != block_scale.shape[channel_axis]:
        inner.error(
            "x_scale",
            f"has {channel_scale.size} values, but axis {axis} of x has "
            f"{block_scale.shape[channel_axis]}",
        )
        return None, None, None
    return (
        block_scale,
        channel_scale.reshape(channel_shape(block_scale.ndim, channel_axis)),
        channel_axis,
    )


def channel_axis_of(shape: tuple[int, ...], block_axis: int) -> int | None:
    """The axis of a channel scale: the only one longer than 1, or the other of two.

    None if the shapes leave it open.
    """
    long = [axis for axis, size in enumerate(shape) if size > 1]
    others = long or [axis for axis in range(len(shape)) if axis != block_axis]
    return others[0] if len(others) == 1 else None


def channel_shape(rank: int, channel_axis: int) -> tuple[int, ...]:
    """-1 at the channel axis and 1 at the others: for reshaping one value per channel."""
    return tuple(-1 if axis == channel_axis else 1 for axis in range(rank))


def build_2(encoding: Encoding, version: str) -> dict[str, Any]:
    """The encoding's entry."""
    if isinstance(encoding, LpbqEncoding):
        return _build_lpbq(encoding, version)
    assert encoding.scale is not None, "convert drops floats without a scale"
    entry: dict[str, Any] = {"name": encoding.name}
    if isinstance(encoding, FloatEncoding):
        entry |= {"output_dtype": encoding.format, "y_scale": encoding.scale.tolist()}
    else:
        entry |= {
            "output_dtype": f"{'int' if encoding.signed else 'uint'}{encoding.bitwidth}",
            "y_scale": encoding.scale.tolist(),
        }
        zero_point = (encoding.center if encoding.signed else 0) - encoding.offset
        if encoding.zero_point_shift or zero_point.any():
            entry["y_zero_point"] = (
                zero_point - encoding.zero_point_shift if encoding.zero_point_shift else zero_point
            ).tolist()
    entry |= {} if encoding.axis is None else {"axis": encoding.axis}
    return entry | ({} if encoding.block_size is None else {"block_size": encoding.block_size})


def _build_lpbq(encoding: LpbqEncoding, version: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": encoding.name, "output_dtype": f"int{encoding.bitwidth}"}
    if version == "2.0.0":
        entry |= {
            "per_block_int_scale": encoding.block_scale.tolist(),
            "per_channel_float_scale": encoding.channel_scale.tolist(),
        }
    else:
        meta = {
            "x": encoding.block_scale.tolist(),
            "x_scale": encoding.channel_scale.reshape(-1).tolist(),
            "axis": encoding.channel_axis,
        }
        entry["y_scale"] = meta
    return entry | {"axis": encoding.axis, "block_size": encoding.block_size}
