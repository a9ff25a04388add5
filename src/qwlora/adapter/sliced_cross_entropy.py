"""Cross-entropy of a linear head whose weight has to be made for each product, a slice of the vocabulary at a time.

    z_t = W h_t + b,    L = sum_t lse_t - z_t[y_t],    lse_t = log sum_v exp z_t[v],    dL/dh_t = sum_v (exp(z_t[v] - lse_t) - [v = y_t]) W_v

A packed weight would be unpacked, and autocast would round a float one, whole for each chunk of tokens: 57 MB for 49,152 x 576 in bfloat16, beside a chunk's
logits in three types. Here a slice of W is made, used for all tokens and forgotten. The first pass over the slices gathers lse with a running maximum, the
second makes the gradient. Given up: the product W h is computed twice, and W gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SLICE_LOGITS = 2**20  # numbers in a slice of logits; 4 MiB in float32
WeightRows = Callable[[int, int], Tensor]


def sliced_cross_entropy(
    hidden: Tensor, targets: Tensor, weight_rows: WeightRows, vocabulary: int, bias: Tensor | None, slice_rows: int | None = None
) -> Tensor:
    """Sum of the cross-entropies of `F.linear(hidden, weight, bias)`, the products computed in the type of the weight's rows.

    Args:
        hidden: [tokens, hidden].
        targets: int64 [tokens].
        weight_rows: gives the rows of the weight from one number to before another, [rows, hidden]; it is not trained.
        vocabulary: rows of the weight.
        bias: [vocabulary], not trained.
        slice_rows: entries of the vocabulary whose logits exist at one time; by default as many as make 4 MiB.

    Returns:
        A scalar in float32, in nats.
    """
    rows = slice_rows or SLICE_LOGITS // max(1, len(hidden)) + 1
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    slices = [(start, min(start + rows, vocabulary)) for start in range(0, vocabulary, rows)]
    result: Tensor = _SlicedCrossEntropy.apply(hidden, targets, weight_rows, bias, slices, wants_gradient)
    return result


class _SlicedCrossEntropy(torch.autograd.Function):
    """The gradient is ready when forward ends; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight_rows: WeightRows, bias: Tensor | None, slices: list[tuple[int, int]], wants_gradient: bool
    ) -> Tensor:
        picked = hidden.new_zeros(len(hidden), dtype=torch.float32)
        highest, total = torch.full_like(picked, -torch.inf), torch.zeros_like(picked)
        for start, _, z in _logits(hidden, weight_rows, bias, slices):
            here, index = _targets_of(targets, start, z)
            picked += z.gather(1, index).squeeze(1) * here
            raised = torch.maximum(highest, z.amax(1))
            total = total * (highest - raised).exp() + z.sub_(raised.unsqueeze(1)).exp_().sum(1)
            highest = raised
        normalizer = highest + total.log()
        gradient = torch.zeros_like(hidden, dtype=torch.float32) if wants_gradient else hidden.new_empty(0)  # a sum over slices
        for start, part, z in _logits(hidden, weight_rows, bias, slices) if wants_gradient else ():
            here, index = _targets_of(targets, start, z)
            probability = z.sub_(normalizer.unsqueeze(1)).exp_()
            probability.scatter_add_(1, index, -here.unsqueeze(1).to(z.dtype))
            gradient += probability.to(part.dtype) @ part
        ctx.save_for_backward(gradient.to(hidden.dtype))
        return (normalizer - picked).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype), None, None, None, None, None)


def _logits(hidden: Tensor, weight_rows: WeightRows, bias: Tensor | None, slices: list[tuple[int, int]]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Where each slice begins, its rows of the weight, and the logits of all tokens for it, float32."""
    x = hidden
    for start, stop in slices:
        part = weight_rows(start, stop)
        x = x.to(part.dtype)  # once, of all slices
        yield start, part, F.linear(x, part, None if bias is None else bias[start:stop].to(x.dtype)).float()


def _targets_of(targets: Tensor, start: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens have their target in this slice, and the column of it there (any column elsewhere), [tokens, 1]."""
    column = targets - start
    here = (column >= 0) & (column < z.shape[1])
    return here, column.clamp(0, z.shape[1] - 1).unsqueeze(1)
