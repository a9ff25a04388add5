"""What the formats with integers in 32-bit words share: unpacking, and one way into a `QuantizedTensor`.

Codes in words form a little-endian bit stream, code `i` in the bits `[i * bitwidth, (i + 1) * bitwidth)`, also where a code of 3 bits crosses from one word
into the next. For 4 and 2 bits that is the layout of `qwlora.grid.packing` too.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from qwlora.errors import GridError, SourceError
from qwlora.grid.encoding import Encoding
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Granularity, PerBlock, PerChannel, Scheme


def unpack_words(
    words: Int[Tensor, "rows words"], bitwidth: int, count: int
) -> UInt8[Tensor, "rows count"]:
    """The first `count` codes, of 1 to 8 bits, of each row of int32 words."""
    stream = words.contiguous().view(torch.uint8)
    group, width = (
        8 // math.gcd(bitwidth, 8),
        bitwidth // math.gcd(bitwidth, 8),
    )  # the fewest codes that fill whole bytes, and these bytes
    groups = math.ceil(count / group)
    if stream.shape[-1] < groups * width:  # a row of words need not end with a whole group
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


def blocks(in_features: int, count: int, where: str) -> Granularity:
    """The granularity of `count` scales for each row of `in_features`.

    Raises:
        SourceError: blocks of one size do not fill the row.
    """
    if not count or in_features % count:
        raise SourceError(
            f"{where}: {count} groups do not divide rows of {in_features} evenly, and blocks of the grid have one size; quantize the float model"
        )
    return PerChannel(0) if count == 1 else PerBlock(in_features // count)


def quantized(
    codes: Tensor,
    bitwidth: int,
    granularity: Granularity,
    scale: Tensor,
    offset: Tensor,
    where: str,
) -> QuantizedTensor:
    """Codes with an encoding; symmetric where every offset is the centre.

    Args:
        codes: uint8.
        bitwidth: of the codes.
        granularity: of scale and offset.
        scale: any float type, made float32; `[out, 1]` where it is per channel.
        offset: integers of AIMET's sign, shaped as `scale`.
        where: file and tensor, for messages.

    Raises:
        SourceError: a scale is not finite and positive, or an offset is outside the codes.
    """
    if isinstance(granularity, PerChannel):
        scale, offset = scale.reshape(-1), offset.reshape(-1)
    symmetric = bool((offset == -(2 ** (bitwidth - 1))).all())
    try:
        encoding = Encoding(
            Scheme(bitwidth, symmetric, granularity),
            scale.to(torch.float32).contiguous(),
            offset.to(torch.int32).contiguous(),
        )
        return QuantizedTensor(codes.contiguous(), encoding)
    except GridError as error:
        raise SourceError(f"{where}: {error}") from error
