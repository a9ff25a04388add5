"""Sum of the cross-entropies of an output head, without all logits at one time.

    L = sum_t lse_t - z_t[y_t],    z = head(h),    lse_t = log sum_v exp z_t[v]

`chunked_cross_entropy` runs any head on a chunk of tokens at a time:

    dL/dz_t = softmax(z_t) - onehot(y_t)

`sliced_cross_entropy` is for a frozen linear head, z_t = W h_t + b, whose weight must be computed:
for each chunk of tokens, a packed weight would be unpacked completely, and autocast would round a
float one (57 MB for 49,152 x 576 in bfloat16, in addition to a chunk's logits in three dtypes). It
computes a slice of W, uses it for all tokens and frees it:

    dL/dh_t = sum_(v != y_t) p_t[v] (W_v - W_y_t)

The sums of exp z and of exp z times W are kept relative to the largest logit so far, and rescaled
when a larger one comes. The gradient is written without p_t[y_t] - 1, so that in bfloat16 it is as
exact for a nearly certain token as for any other.

Both compute loss and gradient together in the forward pass, so nothing is recomputed; backward only
scales the gradient. Given up: second derivatives, and the gradient of a sliced W.

Source of the running sums: online softmax (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLICE_LOGITS = 2**20  # logits in a slice; 4 MiB in float32
HeadPath = Callable[[Tensor], Tensor]
WeightRows = Callable[[int, int], Tensor]


class _WithGradients(torch.autograd.Function):
    """A sum whose gradients by its inputs are known."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(g * scale.to(g.dtype) for g in ctx.saved_tensors))


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, head: HeadPath, trained: list[nn.Parameter], chunk_tokens: int
) -> Tensor:
    """Sum of the cross-entropies of `head(hidden)`, `chunk_tokens` at a time: float32, in nats.

    Args:
        hidden, targets: [tokens, hidden] and int64 [tokens].
        head: maps hidden states to logits [tokens, vocabulary].
        trained: trainable parameters used by `head`.
    """
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or bool(trained))
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    gradients = [torch.empty_like(hidden)] if wants_gradient else []
    gradients += [torch.zeros_like(p) for p in trained if wants_gradient]
    buffer: Tensor | None = None
    for start in range(0, len(hidden), chunk_tokens):
        chunk_rows = slice(start, start + chunk_tokens)
        rows = targets[chunk_rows, None]
        chunk = hidden[chunk_rows].detach().requires_grad_(wants_gradient)
        with torch.set_grad_enabled(wants_gradient):
            logits = head(chunk)
        if buffer is None:  # one for all chunks
            buffer = torch.empty_like(logits, dtype=torch.float32)
        scores = torch.log_softmax(logits.detach().float(), dim=-1, out=buffer[: len(logits)])
        total -= scores.gather(1, rows).sum()
        if wants_gradient:
            scores = scores.exp_()
            scores.scatter_add_(1, rows, torch.full_like(rows, -1, dtype=scores.dtype))
            gradients[0][chunk_rows], *more = torch.autograd.grad(
                logits, (chunk, *trained), scores.to(logits.dtype), allow_unused=True
            )
            for sum_, one in zip(gradients[1:], more, strict=True):
                if one is not None:
                    sum_ += one
    if not wants_gradient:
        return total
    result: Tensor = _WithGradients.apply(total, gradients, hidden, *trained)
    return result


def sliced_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    weight_rows: WeightRows,
    vocabulary: int,
    bias: Tensor | None,
) -> Tensor:
    """Sum of the cross-entropies of `F.linear(hidden, weight, bias)`, in the dtype of the weight:
    float32, in nats.

    Args:
        hidden, targets: [tokens, hidden] and int64 [tokens].
        weight_rows: `weight_rows(start, stop)` are rows of the frozen weight, [rows, hidden].
        vocabulary: number of rows of the weight.
        bias: [vocabulary], frozen.
    """
    size = SLICE_LOGITS // max(1, len(hidden)) + 1
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    x = hidden.detach()
    picked = x.new_zeros(len(x), dtype=torch.float32)  # the target's logit
    others = torch.zeros_like(picked)  # sum of exp of all other logits
    highest = torch.full_like(picked, -torch.inf)
    # Sum over all others of exp times their row of W.
    gradient = torch.zeros_like(x if wants_gradient else x[:0], dtype=torch.float32)
    own_row = torch.zeros_like(gradient)
    for start in range(0, vocabulary, size):
        stop = min(start + size, vocabulary)
        rows = weight_rows(start, stop)
        x = x.to(rows.dtype)  # copies in the first slice only
        z = F.linear(x, rows, None if bias is None else bias[start:stop].to(x.dtype)).float()
        column = targets - start
        here = (column >= 0) & (column < z.shape[1])  # tokens with their target in this slice
        index = column.clamp(0, z.shape[1] - 1).unsqueeze(1)  # any column, for other tokens
        picked += z.gather(1, index).squeeze(1) * here
        raised = torch.maximum(highest, z.amax(1))
        shrunk = (highest - raised).exp()
        e = z.sub_(raised.unsqueeze(1)).exp_()
        e.scatter_(1, index, e.gather(1, index).masked_fill_(here.unsqueeze(1), 0))
        others = others * shrunk + e.sum(1)
        if wants_gradient:
            gradient.mul_(shrunk.unsqueeze(1)).add_(e.to(rows.dtype) @ rows)
            own_row[here] = rows[index[here, 0]].float()
        highest = raised
    whole = others + (picked - highest).exp()
    total = (highest + whole.log() - picked).sum()
    if not wants_gradient:
        return total
    gradient.sub_(own_row.mul_(others.unsqueeze(1))).div_(whole.unsqueeze(1))
    result: Tensor = _WithGradients.apply(total, [gradient.to(hidden.dtype)], hidden)
    return result
