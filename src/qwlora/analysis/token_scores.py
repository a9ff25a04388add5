"""Scores of a language model on each loss token, alone and against a reference model.

    nll_t   = -log q(y_t)                                given the tokens before t
    KL_t    = sum_v p(v) (log p(v) - log q(v))           p: next-token distribution of the reference
    same_t  = argmax_v p(v) == argmax_v q(v)

Natural logarithms, over the whole vocabulary. Both models run on one sequence at a time, and
log-softmax, in float32, on a part of it: besides the models, memory holds the logits of one
sequence from each. Sums over tokens are float64.

The standard error of a mean takes tokens of one cluster (a sequence or a document) as dependent:

    mean   = 1/n sum_t x_t
    error  = 1/n sqrt(G / (G - 1) sum_g (sum_{t in g} (x_t - mean))^2)      G clusters, n tokens
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from qwlora.data.sequences import IGNORED, Sequences, as_sequences
from qwlora.errors import NonFiniteError
from qwlora.system.device import device_of, exact_device
from qwlora.system.processes import gathered, is_mine
from qwlora.system.progress import Track, untracked

COMPARED = ("perplexity_ratio", "kl", "top1")  # keys of scores against a reference
# nats: exp of more overflows float64
LARGEST_LOSS = 709.0
_AT_ONCE = 2**22  # logits whose log-softmax exists at one time

Logits = Callable[[Tensor], Tensor]


def logits_of(model: Callable[..., Any]) -> Logits:
    """A causal language model as a function: ids [1, tokens] to logits [1, tokens, vocabulary]."""

    def logits(ids: Tensor) -> Tensor:
        result: Tensor = model(ids.to(device_of(model)), use_cache=False).logits
        return result

    return logits


@dataclass(frozen=True)
class Comparison:
    """A model against the reference, by loss token."""

    reference_nll: Float64[Tensor, " tokens"]
    kl: Float64[Tensor, " tokens"]  # divergence from the reference, nats
    same_likeliest: Bool[Tensor, " tokens"]  # whether both have the same likeliest token


@dataclass(frozen=True)
class TokenScores:
    """Negative log-likelihoods of the loss tokens of some sequences, in order."""

    nll: Float64[Tensor, " tokens"]  # negative log-likelihood, nats
    sequences: Int64[Tensor, " tokens"]  # the sequence of each token
    documents: Int64[Tensor, " tokens"] | None  # the document of each token, if known
    comparison: Comparison | None  # with a reference only

    @property
    def perplexity(self) -> float:
        """`exp` of the mean of `nll`."""
        return math.exp(float(self.nll.mean()))

    def to_json(self) -> dict[str, Any]:
        """The keys of results.json, see docs/results.md."""
        perplexity = self.perplexity
        errors = self._errors(self.nll, perplexity)
        content: dict[str, Any] = {
            "perplexity": perplexity,
            "perplexity_stderr": errors["stderr"],
            "perplexity_document_stderr": errors["document_stderr"],
        }
        if (against := self.comparison) is None:
            return content
        change = self.nll - against.reference_nll
        ratio = math.exp(float(change.mean()))
        same = against.same_likeliest.double()
        return content | {
            "perplexity_ratio": {"value": ratio, **self._errors(change, ratio)},
            "kl": {
                "mean": float(against.kl.mean()),
                **self._errors(against.kl),
                "p999": float(against.kl.quantile(0.999)),
            },
            "top1": {"share": float(same.mean()), **self._errors(same)},
        }

    def _errors(self, values: Tensor, derivative: float = 1.0) -> dict[str, float | None]:
        """Standard errors of a function of the mean of `values`, by its derivative there."""
        clusters = {"stderr": self.sequences, "document_stderr": self.documents}
        errors = dict[str, float | None]()
        for key, index in clusters.items():
            error = None if index is None else clustered_error(values, index)
            errors[key] = None if error is None else derivative * error
        return errors


def clustered_error(
    values: Float64[Tensor, " tokens"], clusters: Int64[Tensor, " tokens"]
) -> float | None:
    """Standard error of the mean of `values`, which are independent only between clusters; None
    with fewer than two of them."""
    names, index = clusters.unique(return_inverse=True)
    if len(names) < 2:
        return None
    sums = values.new_zeros(len(names)).index_add_(0, index, values - values.mean())
    correction = len(names) / (len(names) - 1)
    return math.sqrt(correction * float(sums.square().sum())) / len(values)


@torch.no_grad()
def score_tokens(
    logits: Logits,
    sequences: Sequences | Int64[Tensor, "count tokens"],
    description: str = "",
    track: Track = untracked,
    reference: Logits | None = None,
) -> TokenScores:
    """Score a model on loss tokens, or on all tokens if `sequences` is a tensor of ids.

    Processes that share a stage run different sequences, and get the scores of all.

    Args:
        reference: logits of the model to compare with; runs on each sequence after `logits`.
    """
    data = as_sequences(sequences)
    parts, numbers, documents = dict[int, tuple[Tensor, ...]](), list[Tensor](), list[Tensor]()
    for number, (ids, labels) in enumerate(track(data.rows(), description, len(data))):
        predicted = (labels[1:] != IGNORED).nonzero()[:, 0] + 1
        numbers.append(torch.full_like(predicted, number))
        if data.documents is not None:
            documents.append(data.documents[number][predicted])
        if not is_mine(number):
            continue
        row = logits(ids[None])[0]
        compared = None if reference is None else reference(ids[None])[0]
        scores = _score_row(row, compared, predicted - 1, labels[predicted])
        measures = ("loss", "reference's loss", "KL divergence")
        for measure, values in zip(measures, scores, strict=False):
            # written so that nan, too, is refused
            if not (total := float(values.sum())) <= LARGEST_LOSS * len(values):
                raise NonFiniteError(
                    f"{description}: the {measure} on sequence {number + 1} of {len(data)} of the "
                    f"held-out text is {total}, so perplexity is undefined. Check the model's "
                    "weights, and the last training or calibration"
                )
        parts[number] = scores
    in_order = [part for _, part in sorted(ChainMap(*gathered(parts)).items())]
    nll, *against = (torch.cat(columns) for columns in zip(*in_order, strict=True))
    return TokenScores(
        nll,
        torch.cat(numbers),
        torch.cat(documents) if documents else None,
        Comparison(*against) if against else None,
    )


def _score_row(
    logits: Tensor, reference: Tensor | None, positions: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    """(nll,) or (nll, reference's nll, KL, same likeliest) of the tokens after `positions`, on the
    CPU."""
    parts, device = [], exact_device(logits.device)
    logits = logits.to(device)
    positions, targets = positions.to(device), targets.to(device)
    size = max(1, _AT_ONCE // logits.shape[-1])
    for at, expected in zip(positions.split(size), targets.split(size), strict=True):
        rows = logits[at].float()
        log_q = rows.log_softmax(-1)
        scores = [-log_q.gather(1, expected[:, None])[:, 0].double()]
        if reference is not None:
            reference_rows = reference[at.to(reference.device)].to(device).float()
            log_p = reference_rows.log_softmax(-1)
            scores.append(-log_p.gather(1, expected[:, None])[:, 0].double())
            difference = log_p - log_q
            # Tokens that the reference excludes add nothing, also where both are minus infinity.
            difference.masked_fill_(log_p == -math.inf, 0)
            scores += [
                (log_p.exp_() * difference).sum(-1, dtype=torch.float64),
                reference_rows.argmax(-1) == rows.argmax(-1),
            ]
        parts.append(tuple(score.cpu() for score in scores))
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
