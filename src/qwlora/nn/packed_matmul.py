"""Products with a packed weight. Autograd keeps the layer, whose codes are there anyway; the weight is unpacked again for backward.

Product           y = x W^T + b                      dL/dx = dL/dy W
AddedProduct      y + x W^T + b, in the memory of y
Convolution       y = conv(x, W) + b
GroupedProduct    y[s_e : s_e+1] = x[s_e : s_e+1] W_e    one expert unpacked at a time, those without rows not at all
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_input, conv2d_input

from qwlora.grid.scheme import Scheme
from qwlora.nn.packed_tensor import PackedTensor, compute_dtype


class PackedWeightOwner(nn.Module):
    """A module with a packed weight, as far as products need to know it; `PackedLayer` is the rest.

    `tensor` is asked for at each product, because moving the module replaces its buffers.
    """

    scheme: Scheme
    compute_dtype: torch.dtype

    @property
    @abstractmethod
    def tensor(self) -> PackedTensor:
        """The packed weight."""


@dataclass(frozen=True, slots=True)
class Part:
    """A packed weight, or one expert of it, as it lies or with its last two axes exchanged. What a `Look` shows, without being a tensor.

    Args:
        owner: the packed layer.
        shape: of the values.
        which: index into the first axis; all of it if None.
        turned: whether the last two axes are those of the codes the other way round.
    """

    owner: PackedWeightOwner
    shape: tuple[int, ...]
    which: Tensor | int | None = None
    turned: bool = False

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The values."""
        values = self.owner.tensor.dequantize(dtype, self.which)
        return values.mT if self.turned else values.view(self.shape)

    def turn(self) -> Part:
        """The last two axes exchanged."""
        return Part(
            self.owner,
            (*self.shape[:-2], self.shape[-1], self.shape[-2]),
            self.which,
            not self.turned,
        )

    def one(self, which: Tensor | int) -> Part:
        """One of the first axis."""
        return Part(self.owner, self.shape[1:], which, self.turned)


class Product(torch.autograd.Function):
    """`F.linear`, the weight a part [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Part) -> Tensor:
        ctx.weight, ctx.dtype = weight, compute_dtype(x)
        return F.linear(x, weight.unpacked(ctx.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return *_gradients(gradient, ctx.weight, *ctx.needs_input_grad[:2]), None


class AddedProduct(torch.autograd.Function):
    """`y += F.linear(x, weight, bias)`, in place; y and x are of one type, in which it is computed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, bias: Tensor | None, weight: Part) -> Tensor:
        ctx.weight = weight
        ctx.mark_dirty(y)
        rows = y.view(-1, y.shape[-1])
        rows.addmm_(x.reshape(-1, x.shape[-1]), weight.unpacked(x.dtype).T)
        if bias is not None:
            rows += bias
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        return gradient, *_gradients(gradient, ctx.weight, *ctx.needs_input_grad[1:3]), None


class Convolution(torch.autograd.Function):
    """`F.conv1d` or `F.conv2d`, the weight a part [out, in / groups, *kernel]; padding in numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weight: Part,
        function: Callable[..., Tensor],
        options: tuple[Any, ...],
    ) -> Tensor:
        ctx.weight, ctx.shape, ctx.function, ctx.options = weight, x.shape, function, options
        return function(x, weight.unpacked(compute_dtype(x)), bias, *options)

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_x = None
        if ctx.needs_input_grad[0]:
            input_gradient = conv1d_input if ctx.function is F.conv1d else conv2d_input
            grad_x = input_gradient(
                ctx.shape, ctx.weight.unpacked(gradient.dtype), gradient, *ctx.options
            )
        spatial = len(ctx.weight.shape) - 2
        channels = [axis for axis in range(gradient.ndim) if axis != gradient.ndim - 1 - spatial]
        return grad_x, gradient.sum(channels) if ctx.needs_input_grad[1] else None, None, None, None


class GroupedProduct(torch.autograd.Function):
    """`F.grouped_mm`: rows up to `offs[e]` (from `offs[e - 1]`) of `x` belong to expert `e`, whose weight is [in, out]; rows past the last get zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offs: Tensor, weight: Part) -> Tensor:
        ctx.weight, ctx.ends, ctx.dtype = weight, offs.tolist(), compute_dtype(x)
        return _by_group(x.to(ctx.dtype), ctx.ends, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _by_group(gradient, ctx.ends, ctx.weight.turn()), None, None


def _gradients(
    gradient: Tensor, weight: Part, of_x: bool, of_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    return gradient @ weight.unpacked(gradient.dtype) if of_x else None, gradient.flatten(
        0, -2
    ).sum(0) if of_bias else None


def _by_group(x: Tensor, ends: list[int], weight: Part) -> Tensor:
    y = x.new_zeros((len(x), weight.shape[-1]))
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > start:
            torch.mm(x[start:end], weight.one(expert).unpacked(x.dtype), out=y[start:end])
    return y
