"""Products with a packed weight W. Autograd keeps the layer instead of the float weight; backward
unpacks the codes again.

    LinearFunction          y = x W^T + b            dL/dx = dL/dy W
    LinearAddFunction       y += x W^T + b, in place
    GroupedMatmulFunction   y[s_e : s_e+1] = x[s_e : s_e+1] W_e
                            one expert is unpacked at a time; experts without rows are skipped

The weight is frozen: it gets no gradient.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwlora.grid.scheme import Scheme
from qwlora.nn.packed_tensor import PackedTensor, compute_dtype


class PackedWeightOwner(nn.Module):
    """What products need of a module with a packed weight; `PackedLayer` is the rest.

    Products read `tensor` each time, because moving the module replaces its buffers.
    """

    scheme: Scheme
    compute_dtype: torch.dtype

    @property
    @abstractmethod
    def tensor(self) -> PackedTensor:
        """The packed weight."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed weight, or one expert of it, as stored or with the last two axes exchanged.

    A `WeightView` shows it as a tensor.

    Args:
        owner: the packed layer.
        shape: shape of the values.
        index: index into the first axis; None for the whole weight.
        transposed: whether the last two axes are exchanged relative to the codes.
    """

    owner: PackedWeightOwner
    shape: tuple[int, ...]
    index: Tensor | int | None = None
    transposed: bool = False

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The float values."""
        values = self.owner.tensor.dequantize(dtype, self.index)
        return values.mT if self.transposed else values.view(self.shape)

    def transpose(self) -> PackedWeight:
        """The same weight with its last two axes exchanged."""
        return PackedWeight(
            self.owner,
            (*self.shape[:-2], self.shape[-1], self.shape[-2]),
            self.index,
            not self.transposed,
        )

    def expert(self, index: Tensor | int) -> PackedWeight:
        """One entry of the first axis."""
        return PackedWeight(self.owner, self.shape[1:], index, self.transposed)


class LinearFunction(torch.autograd.Function):
    """`F.linear` with a weight [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: PackedWeight) -> Tensor:
        ctx.weight, ctx.dtype = weight, compute_dtype(x)
        return F.linear(x, weight.unpacked(ctx.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return *_gradients(gradient, ctx.weight, *ctx.needs_input_grad[:2]), None


class LinearAddFunction(torch.autograd.Function):
    """`y += F.linear(x, weight, bias)`, in place; x and y have one dtype, used for the product."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, bias: Tensor | None, weight: PackedWeight
    ) -> Tensor:
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


class GroupedMatmulFunction(torch.autograd.Function):
    """`F.grouped_mm`: rows `offs[e - 1]` to `offs[e]` of `x` belong to expert `e`, whose weight is
    [in, out]. Rows after the last offset give zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offs: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight, ctx.ends, ctx.dtype = weight, offs.tolist(), compute_dtype(x)
        return _by_group(x.to(ctx.dtype), ctx.ends, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _by_group(gradient, ctx.ends, ctx.weight.transpose()), None, None


def _gradients(
    gradient: Tensor, weight: PackedWeight, of_x: bool, of_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad_x = gradient @ weight.unpacked(gradient.dtype) if of_x else None
    return grad_x, gradient.flatten(0, -2).sum(0) if of_bias else None


def _by_group(x: Tensor, ends: list[int], weight: PackedWeight) -> Tensor:
    y = x.new_zeros((len(x), weight.shape[-1]))
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > start:
            torch.mm(x[start:end], weight.expert(expert).unpacked(x.dtype), out=y[start:end])
    return y
