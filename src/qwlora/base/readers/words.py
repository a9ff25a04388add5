"""What the formats with integers in 32-bit words share: unpacking, and one way into a `QuantizedTensor`.

Codes in words form a little-endian bit stream, code `i` in the bits `[i * bitwidth, (i + 1) * bitwidth)`, also where a code of 3 bits crosses from one word
into the next. That is the layout of `qwlora.grid.packing`, which unpacks it.
"""

from __future__ import annotations

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from qwlora.errors import GridError, SourceError
from qwlora.grid.encoding import Encoding
from qwlora.grid.packing import packed_row_bytes, unpack
from qwlora.grid.quantized import QuantizedTensor
from qwlora.grid.scheme import Granularity, PerBlock, PerChannel, Scheme


def unpack_words(words: Int[Tensor, "rows words"], bitwidth: int, count: int) -> UInt8[Tensor, "rows count"]:
    """The first `count` codes of each row of int32 words."""
    stream, row_bytes = words.contiguous().view(torch.uint8), packed_row_bytes(count, bitwidth)
    if stream.shape[-1] < row_bytes:  # a row of `pack` ends with a whole group of codes, one of words need not
        stream = torch.nn.functional.pad(stream, (0, row_bytes - stream.shape[-1]))
    return unpack(stream[..., :row_bytes].contiguous(), bitwidth, count)


def blocks(in_features: int, count: int, where: str) -> Granularity:
    """The granularity of `count` scales for each row of `in_features`.

    Raises:
        SourceError: blocks of one size do not fill the row.
    """
    if not count or in_features % count:
        raise SourceError(f"{where}: {count} groups do not divide rows of {in_features} evenly, and blocks of the grid have one size; quantize the float model")
    return PerChannel(0) if count == 1 else PerBlock(in_features // count)


def quantized(codes: Tensor, bitwidth: int, granularity: Granularity, scale: Tensor, offset: Tensor, where: str) -> QuantizedTensor:
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
        encoding = Encoding(Scheme(bitwidth, symmetric, granularity), scale.to(torch.float32).contiguous(), offset.to(torch.int32).contiguous())
        return QuantizedTensor(codes.contiguous(), encoding)
    except GridError as error:
        raise SourceError(f"{where}: {error}") from error
