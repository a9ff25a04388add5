"""Perplexity: `exp` of the mean negative log-likelihood of each learnt token given those before it, over sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qwlora.data.sequences import IGNORED, Sequences, as_sequences
from qwlora.progress import Track, untracked

Logits = Callable[[Tensor], Tensor]


def logits_of(model: Callable[..., Any]) -> Logits:
    """What a causal language model of transformers says of token ids."""

    def logits(ids: Tensor) -> Tensor:
        found: Tensor = model(ids, use_cache=False).logits
        return found

    return logits


def negative_log_likelihood(
    logits: Float[Tensor, "batch tokens vocabulary"], labels: Int64[Tensor, "batch tokens"]
) -> float:
    """Sum over the tokens with a label (plain ids are labels too) but each sequence's first, in nats."""
    return float(
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
    )


@torch.no_grad()
def perplexity(
    logits: Logits,
    sequences: Sequences | Int64[Tensor, "count tokens"],
    description: str,
    track: Track = untracked,
) -> float:
    """Perplexity of `logits(ids)` on the learnt tokens of `sequences` (all, if they are plain ids), one sequence at a time."""
    data = as_sequences(sequences)
    total = sum(
        negative_log_likelihood(logits(ids[None]), labels[None])
        for ids, labels in track(data.rows(), description, len(data))
    )
    return math.exp(total / data.learnt_tokens)
