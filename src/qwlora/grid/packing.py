"""Dense bit-packing of codes, in an order that few operations unpack.

A row's codes are split into planes of 8, 4, 2 or 1 bits, lowest bits first, stored one after
another:

    bitwidth    1    2    3        4    5        6        7            8
    planes      1    2    2, 1     4    4, 1     4, 2     4, 2, 1      8

A plane is dense. Planes of 4 or 2 bits start in the low bits of a byte, as in ONNX's INT4 and INT2;
planes of 1 bit start in the high bit, as in `numpy.packbits`. A row is padded with zero codes to a
whole number of groups, where a group is the fewest codes that fill whole bytes in every plane. So a
code costs exactly `bitwidth` bits, and rows share no bytes.

Files of other tools have one stream of bits per row instead, in little-endian int32 words: code `i`
occupies the bits `[i * bitwidth, (i + 1) * bitwidth)`, so a 3-bit code may cross a word boundary
(`pack_words`). For 4 and 2 bits both layouts are the same.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Int, Integer, UInt8
from torch import Tensor

from qwlora.errors import GridError

# One byte of a plane becomes a word of eight bytes with one code each: copies of it, nine bits
# apart so that they do not overlap, have bit 7 - k at the top of byte k. 2^64 is subtracted because
# torch's int64 is signed; the low 64 bits of a product stay the same.
_NINE_APART = sum(1 << 9 * k for k in range(8)) - 2**64
_EACH_BYTE = 0x0101010101010101
_AT_ONCE = 2**22  # codes whose bits are in memory at once, a byte each


def planes_of(bitwidth: int) -> list[int]:
    """Widths of the planes, lowest bits first."""
    return [width for width in (8, 4, 2, 1) if bitwidth & width]


def _group(bitwidth: int) -> int:
    """Codes of the smallest run that fills whole bytes of every plane."""
    if not 1 <= bitwidth <= 8:
        raise GridError(f"codes of {bitwidth} bits are not packed; 1 to 8 bits are")
    return 8 // math.gcd(bitwidth, 8)


def packed_row_bytes(count: int, bitwidth: int) -> int:
    """Bytes of a packed row of `count` codes."""
    group = _group(bitwidth)
    return math.ceil(count / group) * group * bitwidth // 8


def pack(codes: UInt8[Tensor, "*rows count"], bitwidth: int) -> UInt8[Tensor, "*rows bytes"]:
    """Pack the last axis into a new tensor."""
    group = _group(bitwidth)
    if codes.numel() and int(codes.max()) >= 2**bitwidth:
        raise GridError(f"code {int(codes.max())} does not fit in {bitwidth} bits")
    if bitwidth == 8:
        return codes.to(torch.uint8, copy=True, memory_format=torch.contiguous_format)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % group))
    planes, place = [], 0
    for width in planes_of(bitwidth):
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        fields = (padded >> place & 2**width - 1).unflatten(-1, (-1, len(shifts)))
        places = shifts.flip(0) if width == 1 else shifts
        planes.append((fields << places).sum(-1, dtype=torch.uint8))
        place += width
    return torch.cat(planes, -1)


def unpack(
    packed: UInt8[Tensor, "*rows bytes"], bitwidth: int, count: int
) -> UInt8[Tensor, "*rows count"]:
    """Undo `pack` for rows of `count` codes; returns a new tensor."""
    _group(bitwidth)
    if bitwidth == 8:
        return packed.clone()
    # Planes unpack 3, 5, 6 and 7 bits 2 to 2.6 times faster than a stream of bits. Arithmetic on
    # words takes 0.09 ns a weight at 4 bits, a table of values 0.87 and more (docs/log/grid.md).
    codes, begin, place = None, 0, 0
    for width in planes_of(bitwidth):
        end = begin + packed.shape[-1] * width // bitwidth
        plane = _spread(packed[..., begin:end], width, place)
        codes = plane if codes is None else codes.bitwise_or_(plane)
        begin, place = end, place + width
    assert codes is not None
    return codes[..., :count]


def _spread(
    plane: UInt8[Tensor, "*rows bytes"], width: int, place: int
) -> UInt8[Tensor, "*rows codes"]:
    """The codes of a plane, one per byte, shifted up to bit `place`."""
    # each byte is widened to the word of its codes, and operations on words move all codes at once
    if width == 4:
        words = _widened(plane, torch.int16)
        words = words.bitwise_or_(words << 4).bitwise_and_(0x0F0F)
    elif width == 2:  # four bits to each half of the word, then two to each byte
        words = (
            _widened(plane, torch.int32)
            .mul_(1 + (1 << 12))
            .bitwise_and_(0x000F000F)
            .mul_((1 + (1 << 6)) << place)
            .bitwise_and_(0x03030303 << place)
        )
    else:
        words = (
            _widened(plane, torch.int64)
            .mul_(_NINE_APART)
            .bitwise_right_shift_(7 - place)
            .bitwise_and_(_EACH_BYTE << place)
        )
    # the lowest byte of a word is first: all machines that torch is built for are little-endian
    codes = words.view(-1).view(torch.uint8)
    return codes.view(*words.shape[:-1], words.shape[-1] * (8 // width))


def _widened(narrow: Tensor, dtype: torch.dtype) -> Tensor:
    # `to` would keep odd strides of axes of size one, which views of another dtype do not allow
    return torch.empty(narrow.shape, dtype=dtype, device=narrow.device).copy_(narrow)


def unpack_words(
    words: Integer[Tensor, "rows words"], bitwidth: int, count: int
) -> UInt8[Tensor, "rows count"]:
    """Unpack the first `count` codes of each row; `bitwidth` is 1 to 8."""
    stream = words.contiguous().view(torch.uint8)
    # the smallest number of codes that fills whole bytes, and the number of these bytes
    group = _group(bitwidth)
    width = group * bitwidth // 8
    groups = math.ceil(count / group)
    if stream.shape[-1] < groups * width:  # the last group of a row may be incomplete
        stream = torch.nn.functional.pad(stream, (0, groups * width - stream.shape[-1]))
    fields = stream[..., : groups * width].unflatten(-1, (groups, width))
    codes = []
    for place in range(0, group * bitwidth, bitwidth):
        byte, shift = divmod(place, 8)
        field = fields[..., byte] >> shift
        if shift + bitwidth > 8:
            field = field | fields[..., byte + 1] << (8 - shift)
        codes.append(field & (2**bitwidth - 1))
    return torch.stack(codes, -1).flatten(-2)[..., :count]


def pack_words(codes: UInt8[Tensor, "rows count"], bitwidth: int) -> Int[Tensor, "rows words"]:
    """Undo `unpack_words`; each row is padded with zeros to whole words."""
    rows = []
    for part in codes.split(max(1, _AT_ONCE // max(1, codes.shape[1]))):
        stream = ((part.unsqueeze(-1) >> torch.arange(bitwidth, dtype=torch.uint8)) & 1).flatten(1)
        stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32))
        packed = np.packbits(stream.numpy(), axis=1, bitorder="little")
        rows.append(torch.from_numpy(packed).view(torch.int32))
    return torch.cat(rows)
