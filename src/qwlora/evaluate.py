"""Perplexity: `exp` of the mean negative log-likelihood of each token given those before it, over equal sequences."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qwlora.progress import Track, untracked

Logits = Callable[[Tensor], Tensor]


def negative_log_likelihood(logits: Float[Tensor, "batch tokens vocabulary"], ids: Int64[Tensor, "batch tokens"]) -> float:
    """Sum over all tokens but each sequence's first, in nats."""
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))


@torch.no_grad()
def perplexity(logits: Logits, sequences: Int64[Tensor, "count tokens"], description: str, track: Track = untracked) -> float:
    """Perplexity of `logits(ids)` on `sequences`, one sequence at a time."""
    total = sum(negative_log_likelihood(logits(ids[None]), ids[None]) for ids in track(sequences, description, len(sequences)))
    return math.exp(total / (sequences.shape[0] * (sequences.shape[1] - 1)))
