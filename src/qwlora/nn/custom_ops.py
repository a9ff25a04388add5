"""Operators that a captured or compiled graph carries, in the namespace `qwlora`.

    dequantize(packed, ..., count, layout)        float32 [*rows, count], the values of packed codes
    gather(index, packed, ..., count, layout)     float32 [*index, count], the indexed rows only
    linear(x, packed, ..., count, layout)         x W^T in the dtype of x; backward unpacks again
    quantized(x, name)                            x; marks it as the value of encoding `name`

`packed, ...` are the parts of a `PackedTensor`, `layout` is its scheme as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from qwlora.grid.scheme import Scheme
from qwlora.nn.packed_tensor import PackedTensor, Parts

NAMESPACE = "qwlora"


@lru_cache
def _scheme(layout: str) -> Scheme:
    return Scheme.from_json(json.loads(layout))


# The parts of a `PackedTensor`, the number of codes in a row, and the scheme as text
_WEIGHT = (
    "Tensor packed, Tensor scale, Tensor? block_scale, Tensor? zero_point, Tensor? minimum, "
    "int count, str layout"
)


def _operator(
    name: str,
    inputs: str,
    compute: Callable[..., Tensor],
    shape: Callable[..., tuple[int, ...]],
    keeps_dtype: bool,
) -> Any:
    """An operator on `inputs` (at most one tensor) and a packed weight. `compute` takes the
    `PackedTensor`, then the input; `shape` the shape of the codes, then the input. The result is
    float32, or has the dtype of the input."""

    def run(*arguments: Any) -> Tensor:
        *x, packed, scale, block_scale, zero_point, minimum, count, layout = arguments
        parts = Parts(packed, scale, block_scale, zero_point, minimum)
        return compute(PackedTensor(_scheme(layout), count, parts), *x)

    def fake(*arguments: Any) -> Tensor:
        *x, packed, _, _, _, _, count, _ = arguments
        like = x[0] if keeps_dtype else packed
        dtype = like.dtype if keeps_dtype else torch.float32
        result: Tensor = like.new_empty(shape((*packed.shape[:-1], count), *x), dtype=dtype)
        return result

    schema = f"({inputs}{_WEIGHT}) -> Tensor"
    operator = custom_op(f"{NAMESPACE}::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


# keeps a frozen weight one node from torch.export to the exported file
dequantize = _operator(
    "dequantize", "", lambda weight: weight.dequantize(), lambda codes: codes, keeps_dtype=False
)
# `gather` and `linear` are what torch.compile sees of a packed layer
gather = _operator(
    "gather",
    "Tensor index, ",
    lambda weight, index: weight.embedding(index),
    lambda codes, index: (*index.shape, *codes[1:]),
    keeps_dtype=False,
)
linear = _operator(
    "linear",
    "Tensor x, ",
    lambda weight, x: F.linear(x, weight.dequantize(x.dtype)),
    lambda codes, x: (*x.shape[:-1], codes[0]),
    keeps_dtype=True,
)
_linear_backward = _operator(
    "linear_backward",
    "Tensor gradient, ",
    lambda weight, gradient: gradient @ weight.dequantize(gradient.dtype),
    lambda codes, gradient: (*gradient.shape[:-1], codes[-1]),
    keeps_dtype=True,
)


def _keep_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *parts, ctx.count, ctx.layout = inputs
    ctx.save_for_backward(*parts)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    of_weight = [None] * (len(Parts._fields) + 2)
    return _linear_backward(gradient, *ctx.saved_tensors, ctx.count, ctx.layout), *of_weight


linear.register_autograd(_gradient, setup_context=_keep_codes)


@custom_op("qwlora::quantized", mutates_args=())
def quantized(x: Tensor, name: str) -> Tensor:
    """`x`, marked for a writer as the tensor of the encoding `name`."""
    # a custom operator may not return its input
    return x.clone()


@quantized.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)
