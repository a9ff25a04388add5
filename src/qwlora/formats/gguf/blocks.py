"""Decodes GGUF's quantized blocks, and turns them into a `QuantizedTensor`.

    type         bits  block   value                            encoding
    Q4_0, Q5_0   4, 5  32      (code - 2^(bits-1)) * d          symmetric
    Q8_0         8     32      (code - 128) * d                 symmetric
    Q3_K, Q6_K   3, 6  16      (code - 2^(bits-1)) * (d * s)    symmetric
    Q4_1, Q5_1   4, 5  32      code * d + m                     float minimum
    Q2_K         2     16      code * (d * s) - dmin * t        float minimum
    Q4_K, Q5_K   4, 5  32      code * (d * s) - dmin * t        float minimum

`d`, `m` and `dmin` are float16. `s` and `t` are one integer per block: signed in Q3_K and Q6_K,
unsigned in the others. Products are rounded to float32 once, as in the `gguf` package and
llama.cpp, so values are equal bit for bit. The only exception is the sign of zero: -0.0 becomes
0.0.

In the simple types (block 32), the codes follow `d` and `m`:

    4 bits   16 bytes         byte j holds code j in its low half and code j + 16 in its high half
    5 bits   4 + 16 bytes     bit j of a little-endian word is the fifth bit of code j; then the low
                              four bits as above
    8 bits   32 bytes         signed; flipping the top bit gives codes with offset -128

GGUF allows negative and zero scales everywhere:

* Scale zero: the block is constant. It becomes the code of that constant with the scale 2^-14, and
  its own codes are dropped.
* Negative scale, symmetric: the tensor has signed blocks (`SignedBlock`), with its own codes and
  scales.
* Negative scale, float minimum: the codes are reversed and the minimum becomes
  `m + (2^bits - 1) * d` if this gives the same float32 values; otherwise the tensor is refused. No
  quantizer writes such blocks.

Source: `ggml-common.h` and `ggml-quants.c` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

from qwlora.errors import SourceError
from qwlora.grid.encoding import Encoding, QuantizedTensor
from qwlora.grid.scheme import Blocks, PerBlock, Scheme, SignedBlock

CONSTANT_SCALE = 2.0**-14
_AT_ONCE = 2**15


def decode_blocks(kind: str, raw: UInt8[Tensor, "*rows bytes"]) -> list[Tensor]:
    """Decode rows of the GGUF type `kind`, a key of `TYPES`.

    Works on a limited number of blocks at a time, so that temporary tensors stay small.

    Returns:
        Codes `[*rows, in]`; scales `[*rows, in / size]`, which may be negative or zero; and, for
        types with one, minimums of the same shape.
    """
    _, bytes_per_block, decode = TYPES[kind]
    fields = raw.reshape(-1, bytes_per_block)
    whole = [part.new_empty((len(fields), part.shape[-1])) for part in decode(fields[:1])]
    for start in range(0, len(fields), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        for part, piece in zip(whole, decode(fields[some]), strict=True):
            part[some] = piece
    return [part.view(*raw.shape[:-1], -1) for part in whole]


def to_quantized(kind: str, parts: Sequence[Tensor], what: str) -> QuantizedTensor:
    """The quantized tensor with exactly these values.

    Args:
        kind: the GGUF type.
        parts: what `decode_blocks` returns.
        what: the tensor and its type, for messages.

    Raises:
        SourceError: a scale or minimum is not finite, or a negative scale cannot be converted
            exactly.
    """
    for part, name in zip(parts[1:], ("scale", "minimum"), strict=False):
        if bad := int((~torch.isfinite(part)).sum()):
            raise SourceError(
                f"{what}: {bad} of {part.numel()} {name}s are nan or infinite. The file is "
                "damaged; download it again"
            )
    bitwidth, (codes, scale, *minimum) = TYPES[kind][0], parts
    steps, middle, size = 2**bitwidth - 1, 2 ** (bitwidth - 1), codes.shape[-1] // scale.shape[-1]
    codes = codes.unflatten(-1, (-1, size))
    constant, negative = scale == 0, scale < 0
    granularity: Blocks = PerBlock(size)
    if minimum:
        low_end = minimum[0].clone()
        d, m = (part[negative].unsqueeze(-1) for part in (scale, low_end))
        stored, low = codes[negative], d * steps + m
        if not torch.equal(stored.float() * d + m, (steps - stored).float() * -d + low):
            raise SourceError(
                f"{what}: {int(negative.sum())} of {scale.numel()} scales are negative, and no "
                "positive scale gives exactly the same values; "
                "quantize the float model again with llama-quantize"
            )
        low_end[negative] = low.squeeze(-1)
        codes, scale = torch.where(negative.unsqueeze(-1), steps - codes, codes), scale.abs()
    else:
        low_end = torch.full(scale.shape, -middle, dtype=torch.int32)
        granularity = SignedBlock(size) if bool(negative.any()) else granularity
    if bool(constant.any()):
        codes = codes.masked_fill(constant.unsqueeze(-1), 0 if minimum else middle)
    scale = scale.masked_fill(constant, CONSTANT_SCALE)
    scheme = Scheme(bitwidth, not minimum, granularity, float_offset=bool(minimum))
    return QuantizedTensor(codes.flatten(-2), Encoding(scheme, scale, low_end))


def _half(fields: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, as float32 `[*, 1]`."""
    return fields[..., start : start + 2].contiguous().view(torch.float16).to(torch.float32)


def halves(fields: UInt8[Tensor, "*rows bytes"]) -> UInt8[Tensor, "*rows codes"]:
    """All low halves of the bytes, then all high halves."""
    return torch.cat([fields & 0xF, fields >> 4], -1)


def bit_planes(
    fields: UInt8[Tensor, "*rows bytes"], count: int, width: int
) -> UInt8[Tensor, "*rows codes"]:
    """The lowest `width` bits of all bytes, then the next `width` bits of all bytes, `count`
    times."""
    shifts = torch.arange(0, count * width, width, dtype=torch.uint8).unsqueeze(-1)
    return ((fields.unsqueeze(-2) >> shifts) & (2**width - 1)).flatten(-2)


def _simple(bitwidth: int, with_minimum: bool) -> Callable[[Tensor], list[Tensor]]:
    def decode(fields: Tensor) -> list[Tensor]:
        codes = fields[..., -32:] ^ 0x80 if bitwidth == 8 else halves(fields[..., -16:])
        if bitwidth == 5:
            codes |= bit_planes(fields[..., -20:-16].unsqueeze(-1), 8, 1).flatten(-2) << 4
        return [codes, *(_half(fields, start) for start in (0, 2)[: 1 + with_minimum])]

    return decode


def _q2_k(fields: Tensor) -> list[Tensor]:
    pairs = fields[..., :16]
    codes = bit_planes(fields[..., 16:80].unflatten(-1, (2, 32)), 4, 2).flatten(-2)
    return [codes, _half(fields, 80) * (pairs & 0xF), -(_half(fields, 82) * (pairs >> 4))]


def _q3_k(fields: Tensor) -> list[Tensor]:
    high = bit_planes(fields[..., :32], 8, 1)
    low = bit_planes(fields[..., 32:96].unflatten(-1, (2, 32)), 4, 2).flatten(-2)
    scales = halves(fields[..., 96:104]) | bit_planes(fields[..., 104:108], 4, 2) << 4
    return [low | high << 2, _half(fields, 108) * (scales.to(torch.float32) - 32)]


def _k_scales(fields: Tensor) -> list[Tensor]:
    """The float32 scales and minimums of the eight blocks of 32 in Q4_K and Q5_K; their integers
    have six bits each, in the twelve bytes from byte 4."""
    first, second, rest = fields[..., 4:16].chunk(3, -1)
    scale = torch.cat([first & 0x3F, rest & 0xF | first >> 6 << 4], -1)
    minimum = torch.cat([second & 0x3F, rest >> 4 | second >> 6 << 4], -1)
    return [_half(fields, 0) * scale, -(_half(fields, 2) * minimum)]


def _q4_k(fields: Tensor) -> list[Tensor]:
    codes = halves(fields[..., 16:144].unflatten(-1, (4, 32))).flatten(-2)
    return [codes, *_k_scales(fields)]


def _q5_k(fields: Tensor) -> list[Tensor]:
    low = halves(fields[..., 48:176].unflatten(-1, (4, 32))).flatten(-2)
    return [low | bit_planes(fields[..., 16:48], 8, 1) << 4, *_k_scales(fields)]


def _q6_k(fields: Tensor) -> list[Tensor]:
    low = halves(fields[..., :128].unflatten(-1, (2, 64))).flatten(-2)
    high = bit_planes(fields[..., 128:192].unflatten(-1, (2, 32)), 4, 2).flatten(-2)
    return [low | high << 4, _half(fields, 208) * fields[..., 192:208].view(torch.int8)]


TYPES: dict[str, tuple[int, int, Callable[[Tensor], list[Tensor]]]] = {
    "Q4_0": (4, 18, _simple(4, False)),
    "Q4_1": (4, 20, _simple(4, True)),
    "Q5_0": (5, 22, _simple(5, False)),
    "Q5_1": (5, 24, _simple(5, True)),
    "Q8_0": (8, 34, _simple(8, False)),
    "Q2_K": (2, 84, _q2_k),
    "Q3_K": (3, 110, _q3_k),
    "Q4_K": (4, 144, _q4_k),
    "Q5_K": (5, 176, _q5_k),
    "Q6_K": (6, 210, _q6_k),
}
"""By type: bits of a code, bytes of a block, and the function that decodes uint8 `[blocks, bytes]`
into codes `[blocks, codes]`, scales `[blocks, groups]` and, where there are any, minimums."""
