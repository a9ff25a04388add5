"""Entries of an encodings file from encodings of the grid, and back. The only writer of entries.

    grid               entry                                       2.x                 before 2.0
    PerTensor()        IntegerEncoding, scale []                   no axis             PER_TENSOR
    PerChannel(axis)   IntegerEncoding, scale [A]                  axis                PER_CHANNEL
    PerBlock(size)     IntegerEncoding, scale [out, in / size]     axis, block_size    PER_BLOCK
    Lpbq(size)         LpbqEncoding, block and channel scales      axis, block_size    LPBQ
    a float offset     refused: no version has one

Versions before 2.0 have no axis and list blocks in one flat list: in the order of the tensor, or
channel by channel, as aimet-onnx reads them. The weight of an ONNX MatMul is stored [in, out];
`transposed` says so, and swaps scales and axes.
"""

from __future__ import annotations

import numpy as np
import torch

from qwlora.encodings.model import BlockOrder, IntegerEncoding, LpbqEncoding
from qwlora.encodings.model import Encoding as Entry
from qwlora.encodings.to_grid import Placement, grid_of
from qwlora.errors import EncodingsFileError
from qwlora.grid.encoding import Encoding
from qwlora.grid.float_offset import FloatOffsetEncoding
from qwlora.grid.lpbq import split_scales
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, PerTensor, Scheme

_AXIS_SINCE = "2"


def entry_of(
    name: str,
    encoding: Encoding | FloatOffsetEncoding,
    version: str,
    transposed: bool = False,
    block_order: BlockOrder = "tensor",
) -> Entry:
    """The entry that describes `encoding`.

    Args:
        name: the tensor's name in the file.
        encoding: of a tensor [..., out, in].
        version: of the file that will hold the entry.
        transposed: the tensor of that name is stored [in, out].
        block_order: of flat block scales (before 2.0).

    Raises:
        EncodingsFileError: the encoding has float offsets.
    """
    if not isinstance(encoding, Encoding):
        raise EncodingsFileError(
            name, [f"{encoding.scheme} has float offsets, which no encodings file can hold"]
        )
    scheme, scale = encoding.scheme, encoding.scale.detach().cpu()
    flip = transposed and (block_order == "tensor" or version >= _AXIS_SINCE)
    match scheme.granularity:
        case PerTensor():
            return _integers(name, encoding, version, None, None, flip=False)
        case PerChannel(axis):
            return _integers(name, encoding, version, 1 - axis if transposed else axis, None, False)
        case PerBlock(size):
            axis = 0 if transposed else scale.ndim - 1
            return _integers(name, encoding, version, axis, size, flip)
        case Lpbq(size, scale_bitwidth):
            row, integers = split_scales(scale, scheme)
            block_scale, channel_scale = integers.numpy(), row.unsqueeze(-1).double().numpy()
            if flip:
                block_scale, channel_scale = block_scale.T, channel_scale.T
            has_axis = version >= _AXIS_SINCE
            return LpbqEncoding(
                name,
                scheme.bitwidth,
                size,
                block_scale if has_axis else block_scale.reshape(-1),
                channel_scale if has_axis else channel_scale.reshape(-1),
                None if has_axis else scheme.bitwidth + scale_bitwidth,
                (0 if transposed else scale.ndim - 1) if has_axis else None,
                (1 if transposed else 0) if has_axis else None,
            )


def _integers(
    name: str,
    encoding: Encoding,
    version: str,
    axis: int | None,
    block_size: int | None,
    flip: bool,
) -> IntegerEncoding:
    scheme = encoding.scheme
    scale = encoding.scale.detach().cpu().double().numpy()
    offset = encoding.offset.cpu().numpy()
    if flip:
        scale, offset = scale.T, offset.T
    if version < _AXIS_SINCE:
        flat = () if axis is None else (-1,)
        return IntegerEncoding(
            name,
            scheme.bitwidth,
            scale.reshape(flat),
            offset.reshape(flat),
            scheme.symmetric,
            block_size=block_size,
        )
    # In 2.x symmetric means that every offset is at the center. `signed` keeps what was requested.
    centered = bool((offset == scheme.symmetric_offset).all())
    return IntegerEncoding(
        name, scheme.bitwidth, scale, offset, centered, scheme.symmetric, axis, block_size
    )


def encoding_of(entry: Entry) -> Encoding:
    """Undo `entry_of` for an entry of version 2.x whose tensor is stored [..., out, in].

    Raises:
        EncodingsFileError: the entry is a float format or has a zero point shift.
        SourceError: no grid can express it.
    """
    match entry:
        case IntegerEncoding() if not entry.zero_point_shift:
            granularity = (
                PerBlock(entry.block_size)
                if entry.block_size
                else PerTensor()
                if entry.axis is None
                else PerChannel(entry.axis)
            )
            return Encoding(
                Scheme(entry.bitwidth, bool(entry.signed), granularity),
                torch.from_numpy(entry.scale.astype(np.float32)),
                torch.from_numpy(entry.offset.astype(np.int32)),
            )
        case LpbqEncoding():
            *rows, blocks = entry.block_scale.shape
            grid = grid_of(entry, Placement((*rows, blocks * entry.block_size)), "2.1.0")
            assert isinstance(grid, Encoding), "LPBQ has integer offsets"
            return grid
        case _:
            raise EncodingsFileError(entry.name, ["is not a plain integer grid"])
