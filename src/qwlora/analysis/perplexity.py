"""Perplexity: `exp` of the mean negative log-likelihood of each learnt token given those before it,
over sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qwlora.data.sequences import IGNORED, Sequences, as_sequences
from qwlora.errors import NonFiniteError
from qwlora.progress import Track, untracked

LARGEST = 709.0  # nats; exp of more overflows float64

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
    """Sum over the tokens with a label (plain ids are labels too) but each sequence's first, in
    nats.
    """
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
    """Perplexity of `logits(ids)` on the learnt tokens of `sequences` (all, if they are plain ids),
    one sequence at a time.

    Raises:
        NonFiniteError: it is NaN or infinite; the first such sequence is named.
    """
    data = as_sequences(sequences)
    total = 0.0
    for number, (ids, labels) in enumerate(track(data.rows(), description, len(data)), 1):
        loss = negative_log_likelihood(logits(ids[None]), labels[None])
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"{description}: the loss on sequence {number} of {len(data)} of the held-out text "
                f"is {loss}. Check the model's weights, and what was trained or calibrated last"
            )
        total += loss
    mean = total / data.loss_tokens
    if mean > LARGEST:
        raise NonFiniteError(
            f"{description}: the mean loss over the {len(data)} sequences of the held-out text is "
            f"{mean:.4g} nats, and its perplexity is beyond any number. Check the model's weights"
        )
    return math.exp(mean)
