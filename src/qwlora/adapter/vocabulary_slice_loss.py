"""Cross-entropy of a linear head whose weight has to be made for each product, a slice of the vocabulary at a time.

    z_t = W h_t + b,    L = sum_t lse_t - z_t[y_t],    lse_t = log sum_v exp z_t[v],    dL/dh_t = sum_(v != y_t) p_t[v] (W_v - W_y_t)

A packed weight would be unpacked, and autocast would round a float one, whole for each chunk of tokens: 57 MB for 49,152 x 576 in bfloat16, beside a chunk's
logits in three types. Here a slice of W is made, used for all tokens and forgotten. One pass makes loss and gradient: sums of exp z and of exp z times W are
kept relative to the largest logit so far, and shrink when a larger one comes. The gradient is written without p_t[y_t] - 1, so that in bfloat16 that of a
token that is nearly certain is as exact as any other. Given up: W gets no gradient.

Source of the running sums: online softmax (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SLICE_LOGITS = 2**20  # numbers in a slice of logits; 4 MiB in float32
WeightRows = Callable[[int, int], Tensor]


def sliced_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    weight_rows: WeightRows,
    vocabulary: int,
    bias: Tensor | None,
    slice_rows: int | None = None,
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
    result: Tensor = _SlicedCrossEntropy.apply(
        hidden, targets, weight_rows, bias, slices, wants_gradient
    )
    return result


class _SlicedCrossEntropy(torch.autograd.Function):
    """The gradient is ready when forward ends; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight_rows: WeightRows,
        bias: Tensor | None,
        slices: list[tuple[int, int]],
        wants_gradient: bool,
    ) -> Tensor:
        picked, others = (
            hidden.new_zeros(len(hidden), dtype=torch.float32) for _ in range(2)
        )  # the target's logit; sum of exp of all others
        highest = torch.full_like(picked, -torch.inf)
        gradient = torch.zeros_like(
            hidden if wants_gradient else hidden[:0], dtype=torch.float32
        )  # sum of exp of all others times their rows of W
        own_row = torch.zeros_like(gradient)
        x = hidden
        for start, stop in slices:
            part = weight_rows(start, stop)
            x = x.to(part.dtype)  # once, of all slices
            z = F.linear(x, part, None if bias is None else bias[start:stop].to(x.dtype)).float()
            here, index = _targets_of(targets, start, z)
            picked += z.gather(1, index).squeeze(1) * here
            raised = torch.maximum(highest, z.amax(1))
            shrunk = (highest - raised).exp()
            e = z.sub_(raised.unsqueeze(1)).exp_()
            e.scatter_(1, index, e.gather(1, index).masked_fill_(here.unsqueeze(1), 0))
            others = others * shrunk + e.sum(1)
            if wants_gradient:
                gradient.mul_(shrunk.unsqueeze(1)).add_(e.to(part.dtype) @ part)
                own_row[here] = part[index[here, 0]].float()
            highest = raised
        total = others + (picked - highest).exp()
        if wants_gradient:
            gradient.sub_(own_row.mul_(others.unsqueeze(1))).div_(total.unsqueeze(1))
        ctx.save_for_backward(gradient.to(hidden.dtype))
        return (highest + total.log() - picked).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype), None, None, None, None, None)


def _targets_of(targets: Tensor, start: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens have their target in this slice, and the column of it there (any column elsewhere), [tokens, 1]."""
    column = targets - start
    here = (column >= 0) & (column < z.shape[1])
    return here, column.clamp(0, z.shape[1] - 1).unsqueeze(1)
