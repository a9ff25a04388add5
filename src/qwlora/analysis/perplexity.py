"""Perplexity: `exp` of the mean negative log-likelihood of each loss token, given the tokens before
it in its sequence.
"""

from __future__ import annotations

from jaxtyping import Int64
from torch import Tensor

from qwlora.analysis.token_scores import Logits, score_tokens
from qwlora.data.sequences import Sequences
from qwlora.progress import Track, untracked


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
    return score_tokens(logits, sequences, description, track).perplexity
