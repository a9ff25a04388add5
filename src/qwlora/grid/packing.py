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
    """Undo `pack` for rows of `count` codes."""
    per_group, width = _group(bitwidth)
    if bitwidth == 8:
        return packed
    if bitwidth == 4:  # the common case, without wide integers
        return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)[..., :count]
    mask = 2**bitwidth - 1
    if width == 1:
        shifts = bitwidth * torch.arange(per_group, dtype=torch.uint8, device=packed.device)
        return ((packed.unsqueeze(-1) >> shifts) & mask).flatten(-2)[..., :count]
    word_type = torch.int32 if width <= 3 else torch.int64
    groups = packed.unflatten(-1, (-1, width)).to(word_type)
    places = torch.arange(max(per_group, width), dtype=word_type, device=packed.device)
    words = (groups << (8 * places[:width])).sum(-1, keepdim=True, dtype=word_type)
    codes = (words >> (bitwidth * places[:per_group])) & mask
    return codes.to(torch.uint8).flatten(-2)[..., :count]
