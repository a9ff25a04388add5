"""Operators that a captured or compiled graph carries, in the namespace `qwlora`.

    dequantize(packed, ..., count, layout)        float32 [*rows, count], the values of packed codes
    gather(index, packed, ..., count, layout)     float32 [*index, count], the indexed rows only
    linear(x, packed, ..., count, layout)         x W^T in the dtype of x; backward unpacks again
    quantized(x, name)                            x; marks it as the value of encoding `name`

`packed, ...` are the parts of a `PackedTensor`, `layout` is its scheme as JSON. `dequantize` keeps
a frozen weight one node from torch.export to the exported file; `gather` and `linear` are what
torch.compile sees of a packed layer. `quantized` marks a value for a writer; it computes nothing.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qwlora.grid.scheme import Scheme
from qwlora.nn.packed_tensor import PackedTensor, Parts

NAMESPACE = "qwlora"


@lru_cache
def _scheme(layout: str) -> Scheme:
    return Scheme.from_json(json.loads(layout))


def _tensor(parts: tuple[Tensor | None, ...], count: int, layout: str) -> PackedTensor:
    return PackedTensor(_scheme(layout), count, Parts(*parts))  # type: ignore[arg-type]


@torch.library.custom_op("qwlora::dequantize", mutates_args=())
def dequantize(
    packed: Tensor,
    scale: Tensor,
    block_scale: Tensor | None,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    count: int,
    layout: str,
) -> Tensor:
    """The values of packed codes, float32."""
    return _tensor((packed, scale, block_scale, zero_point, minimum), count, layout).dequantize()


@dequantize.register_fake
def _(
    packed: Tensor,
    scale: Tensor,
    block_scale: Tensor | None,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    count: int,
    layout: str,
) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], count), dtype=torch.float32)


@torch.library.custom_op("qwlora::gather", mutates_args=())
def gather(
    index: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_scale: Tensor | None,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    count: int,
    layout: str,
) -> Tensor:
    """The values of the indexed rows, float32."""
    return _tensor((packed, scale, block_scale, zero_point, minimum), count, layout).dequantize(
        index=index
    )


@gather.register_fake
def _(
    index: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_scale: Any,
    zero_point: Any,
    minimum: Any,
    count: int,
    layout: str,
) -> Tensor:
    return packed.new_empty((*index.shape, *packed.shape[1:-1], count), dtype=torch.float32)


@torch.library.custom_op("qwlora::linear", mutates_args=())
def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_scale: Tensor | None,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    count: int,
    layout: str,
) -> Tensor:
    """`x W^T`."""
    weight = _tensor((packed, scale, block_scale, zero_point, minimum), count, layout).dequantize(
        x.dtype
    )
    return torch.nn.functional.linear(x, weight)


@linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_scale: Any,
    zero_point: Any,
    minimum: Any,
    count: int,
    layout: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("qwlora::linear_backward", mutates_args=())
def _linear_backward(
    gradient: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_scale: Tensor | None,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    count: int,
    layout: str,
) -> Tensor:
    return gradient @ _tensor(
        (packed, scale, block_scale, zero_point, minimum), count, layout
    ).dequantize(gradient.dtype)


@_linear_backward.register_fake
def _(
    gradient: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_scale: Any,
    zero_point: Any,
    minimum: Any,
    count: int,
    layout: str,
) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], count))


def _keep_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *parts, ctx.count, ctx.layout = inputs
    ctx.save_for_backward(*parts)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _linear_backward(gradient, *ctx.saved_tensors, ctx.count, ctx.layout), *[None] * (
        len(Parts._fields) + 2
    )


linear.register_autograd(_gradient, setup_context=_keep_codes)


@torch.library.custom_op("qwlora::quantized", mutates_args=())
def quantized(x: Tensor, name: str) -> Tensor:
    """`x`, marked as the tensor of the encoding `name`."""
    return x.clone()


@quantized.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)
