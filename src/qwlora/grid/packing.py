"""Bit-packing of codes, dense.

A row's codes form one little-endian bit stream: code `i` takes the bits `[i * bitwidth, (i + 1) * bitwidth)`, and bit `k` of the stream is bit `k % 8` of
byte `k // 8`. Two and four bits so come out in the order that ONNX gives INT2 and INT4 (first code in the low bits); three bits put eight codes in three bytes.
A row is padded with zero bits to a whole number of groups, a group being the fewest codes that fill whole bytes.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import UInt8
from torch import Tensor

from qwlora.errors import GridError


def _group(bitwidth: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest run of codes that fills whole bytes."""
    if not 1 <= bitwidth <= 8:
        raise GridError(f"codes of {bitwidth} bits are not packed; 1 to 8 bits are")
    common = math.gcd(bitwidth, 8)
    return 8 // common, bitwidth // common


def packed_row_bytes(count: int, bitwidth: int) -> int:
    """Bytes of a packed row of `count` codes."""
    codes, width = _group(bitwidth)
    return math.ceil(count / codes) * width


def pack(codes: UInt8[Tensor, "*rows count"], bitwidth: int) -> UInt8[Tensor, "*rows bytes"]:
    """Pack the last axis.

    Raises:
        GridError: a code does not fit in `bitwidth` bits.
    """
    per_group, width = _group(bitwidth)
    if codes.numel() and int(codes.max()) >= 2**bitwidth:
        raise GridError(f"code {int(codes.max())} does not fit in {bitwidth} bits")
    if bitwidth == 8:
        return codes.contiguous()
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_group))
    groups = padded.unflatten(-1, (-1, per_group)).to(torch.int64)
    words = (groups << (bitwidth * torch.arange(per_group, device=codes.device))).sum(-1, keepdim=True)
    return ((words >> (8 * torch.arange(width, device=codes.device))) & 0xFF).to(torch.uint8).flatten(-2)


def unpack(packed: UInt8[Tensor, "*rows bytes"], bitwidth: int, count: int) -> UInt8[Tensor, "*rows count"]:
    """Undo `pack` for rows of `count` codes.

    Four codes at a time lie in one 32-bit word, `4 * bitwidth` bits of it. Two steps of shift, or and mask move them to its four bytes, which are the codes:
    no pass is wider than 32 bits, and each handles four codes an element.
    """
    _group(bitwidth)
    if bitwidth == 8:
        return packed
    if bitwidth == 4:  # half a word does, and the bytes are read as they lie
        words = _widened(packed, torch.int16)
        words = words.bitwise_or_(words << 4).bitwise_and_(0x0F0F)
    else:
        words = _four_code_words(packed, bitwidth)
        words = _spread(words, 2 * bitwidth, 16, 1)
        words = _spread(words, bitwidth, 8, 0x10001)
    codes_per_word = words.element_size()
    codes = words.view(-1).view(torch.uint8)  # little-endian machines, as is every one that torch is built for
    return codes.view(*words.shape[:-1], words.shape[-1] * codes_per_word)[..., :count]


def _spread(words: Tensor, width: int, place: int, repeat: int) -> Tensor:
    """Move the second `width` bits of each field up to bit `place` of it; `repeat` has a one at the foot of every field."""
    low = (2**width - 1) * repeat
    if 2 * width <= place:  # what the shift copies lands where the mask clears it
        return words.bitwise_or_(words << (place - width)).bitwise_and_(low | low << place)
    high = (words & (low << width)).bitwise_left_shift_(place - width)
    return words.bitwise_and_(low).bitwise_or_(high)


def _four_code_words(packed: Tensor, bitwidth: int) -> Tensor:
    """int32 [*rows, words]: word `i` holds the codes `4 i` to `4 i + 3` in its low `4 * bitwidth` bits."""
    if bitwidth == 2:
        return _widened(packed, torch.int32)
    whole = bitwidth // 2
    if bitwidth % 2 == 0:
        return _joined(packed.unflatten(-1, (-1, whole)))
    groups = packed.unflatten(-1, (-1, bitwidth))  # eight codes; the middle byte belongs half to either word
    middle = _widened(groups[..., whole], torch.int32)
    first, second = middle & 0xF, middle >> 4
    if whole:
        first = first.bitwise_left_shift_(8 * whole).bitwise_or_(_joined(groups[..., :whole]))
        second.bitwise_or_(_joined(groups[..., whole + 1 :]).bitwise_left_shift_(4))
    return torch.stack((first, second), dim=-1).flatten(-2)


def _joined(groups: Tensor) -> Tensor:
    """int32: the bytes of the last axis, lowest first."""
    words = _widened(groups[..., 0], torch.int32)
    for place in range(1, groups.shape[-1]):
        words.bitwise_or_(groups[..., place].to(torch.int32) << 8 * place)
    return words


def _widened(narrow: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that lies densely; `to` would keep odd strides of axes of size one, which no view of another type allows."""
    return torch.empty(narrow.shape, dtype=dtype, device=narrow.device).copy_(narrow)
