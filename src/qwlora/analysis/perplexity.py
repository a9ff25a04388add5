"""Perplexity: `exp` of the mean negative log-likelihood of each loss token, given the tokens before
it in its sequence.
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

LARGEST_LOSS = 709.0  # nats; exp of more overflows float64

Logits = Callable[[Tensor], Tensor]


def logits_of(model: Callable[..., Any]) -> Logits:
    """A function from token ids to the logits of a causal language model of transformers."""

    def logits(ids: Tensor) -> Tensor:
        found: Tensor = model(ids, use_cache=False).logits
        return found

    return logits


def negative_log_likelihood(
    logits: Float[Tensor, "batch tokens vocabulary"], labels: Int64[Tensor, "batch tokens"]
) -> float:
    """Sum over all tokens with a label, except the first of each sequence, in nats. Token ids can
    be their own labels.
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
    """Perplexity of `logits(ids)` on the loss tokens of `sequences`, or on all tokens if it is a
    tensor of ids. Runs one sequence at a time.

    Raises:
        NonFiniteError: the perplexity is NaN or infinite. The message names the first such
            sequence.
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
    if mean > LARGEST_LOSS:
        raise NonFiniteError(
            f"{description}: the mean loss over the {len(data)} sequences of the held-out text is "
            f"{mean:.4g} nats, too much for a perplexity. Check the model's weights"
        )
    return math.exp(mean)
