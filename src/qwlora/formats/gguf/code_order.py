"""The order of codes in GGUF's simple blocks: Q4_0, Q4_1 (4 bits), Q5_0, Q5_1 (5 bits), Q8_0 (8
bits).

A block holds 32 contiguous codes of a row. They follow its float16 scale and, in the `_1` types,
its float16 minimum:

    4 bits   16 bytes         byte j holds code j in its low half and code j + 16 in its high half
    5 bits   4 + 16 bytes     the fifth bits, with bit j of a little-endian word for code j; then
    the
                              low four bits as above
    8 bits   32 bytes         signed bytes; flipping the top bit gives codes with offset -128

Types ending in 0 have the values `(code - 2^(bits - 1)) * scale`, those ending in 1 have
`code * scale + minimum`. Source: `ggml-common.h` of llama.cpp.
"""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

from qwlora.errors import GridError

BLOCK = 32
CODE_BYTES = {4: 16, 5: 20, 8: 32}


def unpack_block_codes(
    fields: UInt8[Tensor, "*blocks bytes"], bitwidth: int
) -> UInt8[Tensor, "*blocks 32"]:
    """Unpack the codes of blocks.

    Raises:
        GridError: the bitwidth is not 4, 5 or 8, or a block has the wrong number of bytes.
    """
    _check(fields.shape[-1], CODE_BYTES, bitwidth)
    if bitwidth == 8:
        return fields ^ 0x80
    low = halves(fields[..., -BLOCK // 2 :])
    return (
        low
        if bitwidth == 4
        else low | bit_planes(fields[..., :4].unsqueeze(-1), 8, 1).flatten(-2) << 4
    )


def pack_block_codes(
    codes: UInt8[Tensor, "*blocks 32"], bitwidth: int
) -> UInt8[Tensor, "*blocks bytes"]:
    """The inverse of `unpack_block_codes`.

    Raises:
        GridError: the bitwidth is not 4, 5 or 8, a block does not have 32 codes, or a code has too
            many bits.
    """
    _check(codes.shape[-1], dict.fromkeys(CODE_BYTES, BLOCK), bitwidth)
    if codes.numel() and int(codes.max()) >= 2**bitwidth:
        raise GridError(f"code {int(codes.max())} does not fit in {bitwidth} bits")
    if bitwidth == 8:
        return codes ^ 0x80
    first, second = (codes & 0xF).chunk(2, -1)
    low = first | second << 4
    if bitwidth == 4:
        return low
    fifth = (codes >> 4).unflatten(-1, (4, 8)) << torch.arange(
        8, dtype=torch.uint8, device=codes.device
    )
    return torch.cat([fifth.sum(-1, dtype=torch.uint8), low], -1)


def halves(fields: UInt8[Tensor, "*rows bytes"]) -> UInt8[Tensor, "*rows codes"]:
    """All low halves of the bytes, then all high halves."""
    return torch.cat([fields & 0xF, fields >> 4], -1)


def bit_planes(
    fields: UInt8[Tensor, "*rows bytes"], count: int, width: int
) -> UInt8[Tensor, "*rows codes"]:
    """The lowest `width` bits of all bytes, then the next `width` bits of all bytes, `count`
    times."""
    shifts = torch.arange(
        0, count * width, width, dtype=torch.uint8, device=fields.device
    ).unsqueeze(-1)
    return ((fields.unsqueeze(-2) >> shifts) & (2**width - 1)).flatten(-2)


def _check(found: int, expected: dict[int, int], bitwidth: int) -> None:
    if bitwidth not in expected:
        raise GridError(f"GGUF's simple blocks hold codes of 4, 5 or 8 bits, not {bitwidth}")
    if found != expected[bitwidth]:
        raise GridError(
            f"the last axis of {bitwidth}-bit blocks must have length {expected[bitwidth]}, not "
            f"{found}"
        )
