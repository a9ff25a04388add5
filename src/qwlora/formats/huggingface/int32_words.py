"""Codes stored in int32 words: what several readers and writers share.

The words of a row form a little-endian bit stream: code `i` occupies the bits
`[i * bitwidth, (i + 1) * bitwidth)`, so a 3-bit code may cross a word boundary. For 4 and 2 bits
this is also the layout of `qwlora.grid.packing`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from qwlora.errors import GridError, SourceError
from qwlora.grid.encoding import Encoding, QuantizedTensor
from qwlora.grid.scheme import Granularity, PerBlock, PerChannel, Scheme

_AT_ONCE = 2**22  # codes whose bits are in memory at once, a byte each


def unpack_words(
    words: Int[Tensor, "rows words"], bitwidth: int, count: int
) -> UInt8[Tensor, "rows count"]:
    """Unpack the first `count` codes of each row; `bitwidth` is 1 to 8."""
    stream = words.contiguous().view(torch.uint8)
    # the smallest number of codes that fills whole bytes, and the number of these bytes
    group, width = 8 // math.gcd(bitwidth, 8), bitwidth // math.gcd(bitwidth, 8)
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
        bits = (part.unsqueeze(-1) >> torch.arange(bitwidth, dtype=torch.uint8)) & 1
        stream = bits.flatten(1)
        stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32))
        packed = np.packbits(stream.numpy(), axis=1, bitorder="little")
        rows.append(torch.from_numpy(packed).view(torch.int32))
    return torch.cat(rows)


def group_granularity(in_features: int, size: float, where: str) -> Granularity:
    """The granularity of groups of `size` inputs; refused if they do not divide the row."""
    if size < 1 or size % 1 or in_features % size:
        raise SourceError(
            f"{where}: groups of {size:g} do not divide rows of {in_features} evenly, but all "
            "blocks must have the same size. Quantize the float model instead"
        )
    return PerChannel(0) if size == in_features else PerBlock(int(size))


def quantized_tensor(
    codes: Tensor,
    bitwidth: int,
    granularity: Granularity,
    scale: Tensor,
    offset: Tensor,
    where: str,
) -> QuantizedTensor:
    """Build a `QuantizedTensor`; its scheme is symmetric if every offset is `-2^(bitwidth - 1)`.

    Args:
        codes: uint8.
        bitwidth: bits of a code.
        granularity: the granularity of scale and offset.
        scale: any float type, converted to float32; `[out, 1]` if per channel.
        offset: integers in AIMET's sign, with the shape of `scale`.
        where: file and tensor, for messages.

    Raises:
        SourceError: a scale is not finite and positive, or an offset is out of range.
    """
    if isinstance(granularity, PerChannel):
        scale, offset = scale.reshape(-1), offset.reshape(-1)
    scheme = Scheme(bitwidth, bool((offset == -(2 ** (bitwidth - 1))).all()), granularity)
    scale, offset = scale.to(torch.float32).contiguous(), offset.to(torch.int32).contiguous()
    try:
        return QuantizedTensor(codes.contiguous(), Encoding(scheme, scale, offset))
    except GridError as error:
        raise SourceError(f"{where}: {error}") from error
