"""From an entry of an AIMET encodings file to the grid of a parameter.

An entry describes the tensor that its exporter saw. AIMET's `sim.export` uses torch's names and
layouts. Its `sim.onnx.export` uses names of ONNX tensors: the weight of a MatMul is stored [in,
out], under the parameter's name and a number (`fc.weight_0`). Our quantized matrices are [out, in],
so a `Placement` says whether the entry's tensor is transposed. Axes come from the entry (2.x) or
are the parameter's output axis.

Version 1.0.0 has block scales in one flat list. For a tensor [out, in] they run along each row; for
[in, out] they follow the tensor ("tensor") or the output channels ("channel"), depending on the
exporter. The order matters only if the two readings differ.

A zero point shift of half a step is a float offset:

    AIMET    x_hat = (q + offset + 0.5) * scale
    here     x_hat = q * scale + minimum,  minimum = (offset + 0.5) * scale

Both have the same codes. Values differ by the rounding of float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwlora.encodings.model import BlockOrder, FloatEncoding, IntegerEncoding, LpbqEncoding
from qwlora.encodings.model import Encoding as Entry
from qwlora.errors import GridError, SourceError
from qwlora.grid.encoding import Encoding
from qwlora.grid.float_offset import FloatOffsetEncoding
from qwlora.grid.lpbq import split_scales
from qwlora.grid.scheme import Granularity, Lpbq, PerBlock, PerChannel, PerTensor, Scheme


@dataclass(frozen=True)
class Placement:
    """A parameter and the layout of the entry's tensor.

    Args:
        shape: of the parameter with its matrix as [out, in].
        transposed: the entry's tensor is [in, out].
        channel_axis: the output axis of `shape`.
        block_order: of flat block scales; None if unknown.
    """

    shape: tuple[int, ...]
    transposed: bool = False
    channel_axis: int = 0
    block_order: BlockOrder | None = None

    def axis(self, axis: int) -> int:
        """An axis of the entry's tensor as an axis of `shape`."""
        axis %= len(self.shape)
        return len(self.shape) - 1 - axis if self.transposed else axis


def grid_of(entry: Entry, placement: Placement, version: str) -> Encoding | FloatOffsetEncoding:
    """The grid of a parameter.

    Raises:
        SourceError: no grid can express the entry, the entry does not fit the shape, or the order
            of its blocks is unknown. The message does not contain the entry's name.
    """
    try:
        match entry:
            case IntegerEncoding():
                return _integer_grid(entry, placement, version)
            case LpbqEncoding():
                return _lpbq_grid(entry, placement)
            case FloatEncoding():
                raise SourceError(f"is a float of {entry.bitwidth} bits, not a grid of integers")
    except GridError as error:
        raise SourceError(str(error)) from error


def _integer_grid(
    entry: IntegerEncoding, placement: Placement, version: str
) -> Encoding | FloatOffsetEncoding:
    scale, offset = (np.asarray(values) for values in (entry.scale, entry.offset))
    granularity: Granularity
    if not scale.ndim or (scale.size == 1 and entry.block_size is None):
        granularity, scale, offset = PerTensor(), scale.reshape(()), offset.reshape(())
    elif entry.block_size is None:
        granularity = PerChannel(_channel_axis(entry, placement, version))
        scale, offset = scale.reshape(-1), offset.reshape(-1)
    else:
        granularity = PerBlock(entry.block_size)
        scale, offset = (
            _blocks(values, entry.axis, entry.block_size, placement) for values in (scale, offset)
        )
    if entry.zero_point_shift:
        scheme = Scheme(entry.bitwidth, symmetric=False, granularity=granularity, float_offset=True)
        minimum = (offset + entry.zero_point_shift) * scale
        return FloatOffsetEncoding(scheme, _floats(scale), _floats(minimum))
    symmetric = bool((offset == entry.center).all())
    return Encoding(
        Scheme(entry.bitwidth, symmetric, granularity),
        _floats(scale),
        torch.from_numpy(np.array(offset, dtype=np.int32)),
    )


def _lpbq_grid(entry: LpbqEncoding, placement: Placement) -> Encoding:
    integers = _blocks(entry.block_scale, entry.axis, entry.block_size, placement)
    if entry.axis is None or entry.channel_scale.ndim < 2:
        channel = np.asarray(entry.channel_scale).reshape(-1, *[1] * (integers.ndim - 1))
    else:
        channel = np.asarray(entry.channel_scale)
        channel = channel.T if placement.transposed else channel
    if any(count % own for count, own in zip(integers.shape, channel.shape, strict=True)):
        raise SourceError(
            f"has channel scales of shape {list(channel.shape)}, which {list(integers.shape)} "
            "blocks cannot share evenly"
        )
    for axis, count in enumerate(integers.shape):
        channel = channel.repeat(count // channel.shape[axis], axis)
    scale = _floats(integers) * _floats(channel)
    bits = (
        (entry.decompressed_bitwidth - entry.bitwidth)
        if entry.decompressed_bitwidth is not None
        else max(1, int(integers.max() - 1).bit_length())
    )
    scheme = Scheme(entry.bitwidth, True, _lpbq_granularity(scale, entry, bits))
    return Encoding(
        scheme, scale, torch.full(scale.shape, scheme.symmetric_offset, dtype=torch.int32)
    )


def _lpbq_granularity(scale: Tensor, entry: LpbqEncoding, bits: int) -> PerBlock | Lpbq:
    """Lpbq if both factors can be recovered: each row has a block with the largest integer."""
    try:
        granularity = Lpbq(entry.block_size, bits)
        split_scales(scale, Scheme(entry.bitwidth, True, granularity))
    except GridError:
        return PerBlock(entry.block_size)
    return granularity


def _channel_axis(entry: IntegerEncoding, placement: Placement, version: str) -> int:
    axis = placement.channel_axis if entry.axis is None else placement.axis(entry.axis)
    if entry.scale.size != placement.shape[axis]:
        lost = (
            "; version 0.6.1 lists scales of blocks as channels and loses their shape: export "
            "1.0.0 or later"
            if version == "0.6.1"
            else ""
        )
        raise SourceError(
            f"has {entry.scale.size} scales, but axis {axis} of {list(placement.shape)} has "
            f"{placement.shape[axis]}{lost}"
        )
    return axis


def _blocks(values: np.ndarray, axis: int | None, size: int, placement: Placement) -> np.ndarray:
    """Values of blocks as [..., out, in / size]."""
    *rows, columns = placement.shape
    if len(placement.shape) != 2 or columns % size:
        raise SourceError(
            f"has blocks of {size}, which do not divide the inputs of a matrix of shape "
            f"{list(placement.shape)}"
        )
    expected = (*rows, columns // size)
    if axis is not None:
        values = values.T if placement.transposed else values
        if placement.axis(axis) != 1:
            raise SourceError("has blocks along the output; quantize with blocks along the input")
        if values.ndim != 2 or any(
            n not in (1, m) for n, m in zip(values.shape, expected, strict=True)
        ):
            raise SourceError(
                f"has {list(values.shape)} blocks, but a matrix of shape {list(placement.shape)} "
                f"needs {list(expected)}"
            )
        return np.broadcast_to(values, expected)
    if values.size != expected[0] * expected[1]:
        raise SourceError(
            f"has {values.size} blocks, but a matrix of shape {list(placement.shape)} needs "
            f"{list(expected)}"
        )
    readings: dict[BlockOrder, np.ndarray] = {
        "channel": values.reshape(expected),
        "tensor": values.reshape(expected[::-1]).T,
    }
    if placement.block_order is not None:
        return readings[placement.block_order]
    if not np.array_equal(readings["channel"], readings["tensor"]):
        raise SourceError(
            "is a flat list of blocks in an unknown order: by output channel, or as a tensor "
            "stored [in, out]. Set model.block_order: channel or tensor in the recipe "
            "(block_order='channel' or 'tensor' in Python), or export version 2.0.0"
        )
    return readings["channel"]


def _floats(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))
