"""Two operators that a captured graph carries, in the namespace `qwlora`.

    dequantize(packed, scale, offset, count, bitwidth, axis, block_size)    float32 [rows, count], the values of packed codes
    quantized(x, name)                                                      x itself; says "this value has the encoding `name`"

`dequantize` keeps a frozen weight one node from torch.export to the exported file. `quantized` marks a value for a writer; it computes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwlora.grid.encoding import aligned, grouped
from qwlora.grid.packing import unpack
from qwlora.grid.scheme import Scheme, granularity_of

NAMESPACE = "qwlora"


@torch.library.custom_op("qwlora::dequantize", mutates_args=())
def dequantize(packed: Tensor, scale: Tensor, offset: Tensor | None, count: int, bitwidth: int, axis: int | None, block_size: int | None) -> Tensor:
    """`(q + offset) * scale` for codes packed along the last axis."""
    codes = unpack(packed, bitwidth, count)
    granularity = granularity_of(axis, block_size)
    shift = Scheme(bitwidth).symmetric_offset if offset is None else aligned(offset, granularity, codes.ndim)
    values = grouped(codes, granularity).to(scale.dtype).add_(shift).mul_(aligned(scale, granularity, codes.ndim))
    return values.view(codes.shape)


@dequantize.register_fake
def _(packed: Tensor, scale: Tensor, offset: Tensor | None, count: int, bitwidth: int, axis: int | None, block_size: int | None) -> Tensor:
    return scale.new_empty((*packed.shape[:-1], count))


@torch.library.custom_op("qwlora::quantized", mutates_args=())
def quantized(x: Tensor, name: str) -> Tensor:
    """`x`, marked as the tensor of the encoding `name`."""
    return x.clone()


@quantized.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)
