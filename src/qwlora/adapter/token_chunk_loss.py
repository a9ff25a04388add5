"""Cross-entropy of a head's logits, a chunk of tokens at a time.

    L = sum_t -log softmax(z_t)[y_t],    z = head(h),    dL/dz_t = softmax(z_t) - onehot(y_t)

Loss and gradient of a chunk are computed together in the forward pass. So only one chunk's logits
and softmax exist at a time, and nothing is recomputed. Given up: second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HeadPath = Callable[[Tensor], Tensor]


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, head: HeadPath, trained: list[nn.Parameter], chunk_tokens: int
) -> Tensor:
    """Sum of the cross-entropies of `head(hidden)`, `chunk_tokens` at a time.

    Args:
        hidden: [tokens, hidden].
        targets: int64 [tokens].
        head: maps hidden states to logits [tokens, vocabulary].
        trained: trainable parameters used by `head`.

    Returns:
        A scalar in float32, in nats.
    """
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or bool(trained))
    result: Tensor = _ChunkedCrossEntropy.apply(
        hidden, targets, head, chunk_tokens, wants_gradient, *trained
    )
    return result


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients too; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: HeadPath,
        chunk_tokens: int,
        wants_gradient: bool,
        *trained: Tensor,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if wants_gradient else hidden.new_empty(0)
        gradients = [torch.zeros_like(p) for p in trained] if wants_gradient else []
        buffer: Tensor | None = None
        for start in range(0, len(hidden), chunk_tokens):
            chunk_rows = slice(start, start + chunk_tokens)
            rows = targets[chunk_rows, None]
            with torch.set_grad_enabled(wants_gradient):
                chunk = hidden[chunk_rows].detach().requires_grad_(wants_gradient)
                logits = head(chunk)
            if buffer is None:  # one for all chunks
                buffer = torch.empty_like(logits, dtype=torch.float32)
            scores = torch.log_softmax(logits.detach().float(), dim=-1, out=buffer[: len(logits)])
            total -= scores.gather(1, rows).sum()
            if wants_gradient:
                scores = scores.exp_()
                scores.scatter_add_(1, rows, torch.full_like(rows, -1, dtype=scores.dtype))
                gradient[chunk_rows], *more = torch.autograd.grad(
                    logits, (chunk, *trained), scores.to(logits.dtype), allow_unused=True
                )
                for sum_, one in zip(gradients, more, strict=True):
                    if one is not None:
                        sum_ += one
        ctx.save_for_backward(gradient, *gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *gradients = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        first = (gradient * scale.to(gradient.dtype)) if wanted[0] else None
        return (first, None, None, None, None, *(g * scale.to(g.dtype) for g in gradients))
