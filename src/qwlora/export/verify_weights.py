"""The proof of a weights target: its files, run in its runtime, against the trained model.

    base        the runtime without an adapter, against the packed base
    adapter     the same with the adapter, against the base with the adapter that was trained
    off again   without it once more: bit for bit what it was before

Weights are the same integers on both sides and everything else is float, so only rounding may
differ: a logit by LOGIT_DIFFERENCE of the largest logit, the likeliest token of one token in a
thousand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor

from qwlora.data.sequences import Sequences
from qwlora.export.verify import Limits, LogitDifference, Runtime, token_losses
from qwlora.progress import Track, untracked

LOGIT_DIFFERENCE = 1e-4
AGREEMENT = 0.999


class WeightsRuntime(Protocol):
    """A base folder, opened in the program that it was written for, with exact settings.

    Attributes:
        shipped: the same with the program's own settings, if those compute something else.
    """

    @property
    def shipped(self) -> WeightsRuntime | None: ...

    def use(self, adapter: Path | None) -> None:
        """Switch to the adapter in a folder, or to none."""

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 logits [batch, tokens, vocabulary] of token ids [batch, tokens]."""

    def decode(self, ids: Tensor, count: int) -> list[int]:
        """The `count` likeliest tokens after token ids [1, tokens], one by one, with a cache."""


class SwitchableRuntime(Runtime, WeightsRuntime, Protocol):
    """A base folder with simulated activations; every method computes with the active adapter."""

    @property
    def has_cache(self) -> bool:
        """Whether keys and values of earlier tokens are inputs."""

    def extend(self, ids: Tensor, past: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of new tokens, and the cache with them; an empty `past` begins a sequence."""


def switching_problems(
    runtime: WeightsRuntime, adapter: Path | None, others: Sequence[Path], ids: Tensor
) -> Iterator[str]:
    """A sentence for each state whose logits differ after other adapters were active.

    Args:
        adapter: folder of an adapter; None: the base.
        others: folders of further adapters.
        ids: token ids [1, tokens].
    """
    before: dict[Path | None, Tensor] = {}
    for state in (None, adapter, *others, None, adapter):
        runtime.use(state)
        logits = runtime.logits(ids)
        if not torch.equal(before.setdefault(state, logits), logits):
            what = "without an adapter" if state is None else f"with adapter {state.name}"
            yield f"logits {what} differ after other adapters were active"
    runtime.use(None)


@dataclass(frozen=True)
class WeightsParity:
    """How far a runtime is from the trained model.

    Args:
        max_abs_logit_difference, mean_abs_logit_difference: with the adapter.
        largest_logit: of the trained model, absolute.
        top1_agreement: share of tokens with the same likeliest next token.
        base_max_abs_logit_difference: without the adapter, on the first sequence.
        off_is_equal: whether switching the adapter off gives the bits of before.
        perplexity, reference_perplexity: of the runtime and of the trained model.
        sequences, tokens: compared.
        shipped_perplexity, shipped_top1_agreement: with the runtime's own settings; None if these
            are the exact ones.
    """

    max_abs_logit_difference: float
    mean_abs_logit_difference: float
    largest_logit: float
    top1_agreement: float
    base_max_abs_logit_difference: float
    off_is_equal: bool
    perplexity: float
    reference_perplexity: float
    sequences: int
    tokens: int
    shipped_perplexity: float | None = None
    shipped_top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    def broken_limits(self, limits: Limits) -> Iterator[str]:
        """A sentence for each limit that is exceeded."""
        allowed = LOGIT_DIFFERENCE * self.largest_logit
        for what, found in (
            ("with the adapter", self.max_abs_logit_difference),
            ("without it", self.base_max_abs_logit_difference),
        ):
            if not found <= allowed:
                yield f"a logit {what} is off by {found:.3g} (limit {allowed:.3g})"
        if not self.top1_agreement >= AGREEMENT:
            yield (
                f"the likeliest token is the same for {self.top1_agreement:.2%} of tokens (limit "
                f"{AGREEMENT:.1%})"
            )
        if not self.off_is_equal:
            yield "after the adapter is switched off, logits differ from those before"
        difference = abs(self.perplexity / self.reference_perplexity - 1)
        if not difference <= limits.perplexity_difference:
            yield (
                f"perplexity differs by {difference:.2%} (limit {limits.perplexity_difference:.2%})"
            )


@torch.no_grad()
def verify_weights(
    runtime: WeightsRuntime,
    model: PeftModel,
    adapter: Path,
    sequences: Sequences,
    track: Track = untracked,
) -> WeightsParity:
    """Compare the runtime's logits on `sequences` with those of the trained `model`.

    Args:
        model: the packed base with the trained adapter.
        adapter: the exported adapter.

    Raises:
        ExportError: the runtime refuses the adapter.
    """
    first = next(sequences.rows())[0][None]
    runtime.use(None)
    before = runtime.logits(first)
    with model.disable_adapter():
        base = (before - model(input_ids=first).logits.float()).abs().max()
    runtime.use(adapter)
    found, nll, reference_nll, largest = LogitDifference(), 0.0, 0.0, 0.0
    shipped, shipped_nll = LogitDifference(), 0.0
    for ids, labels in track(sequences.rows(), "verifying", len(sequences)):
        expected = model(input_ids=ids[None]).logits.float()
        logits = runtime.logits(ids[None])
        found.update(logits, expected)
        nll += float(token_losses(logits, labels).sum())
        reference_nll += float(token_losses(expected, labels).sum())
        largest = max(largest, float(expected.abs().max()))
        if runtime.shipped is not None:
            logits = runtime.shipped.logits(ids[None])
            shipped.update(logits, expected)
            shipped_nll += float(token_losses(logits, labels).sum())
    runtime.use(None)
    tokens = sequences.loss_tokens
    return WeightsParity(
        max_abs_logit_difference=found.largest,
        mean_abs_logit_difference=found.total / found.count,
        largest_logit=largest,
        top1_agreement=found.agreement,
        base_max_abs_logit_difference=float(base),
        off_is_equal=torch.equal(runtime.logits(first), before),
        perplexity=math.exp(nll / tokens),
        reference_perplexity=math.exp(reference_nll / tokens),
        sequences=len(sequences),
        tokens=found.tokens,
        shipped_perplexity=math.exp(shipped_nll / tokens) if shipped.tokens else None,
        shipped_top1_agreement=shipped.agreement if shipped.tokens else None,
    )
