"""The proof of a weights target: its files, run in its runtime, against the trained model.

    base        the runtime without an adapter, against the packed base
    adapter     the same with the adapter, against the base with the adapter that was trained
    off again   without it once more: bit for bit what it was before

Weights are the same integers on both sides and everything else is float, so only rounding may
differ: a logit by LOGIT_DIFFERENCE of the largest logit, the likeliest token of one token in a
thousand. Where a runtime rounds activations more coarsely than float32 (`WeightsTarget.rounding`),
the trained model is also computed with that rounding, and what it changes there is allowed on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor

from qwlora.data.sequences import Sequences
from qwlora.export.finite_figures import is_same, largest, only_finite, perplexity
from qwlora.export.verify import (
    Limits,
    LogitDifference,
    NoiseFloor,
    Runtime,
    largest_drift,
    perplexity_floor,
    token_losses,
)
from qwlora.progress import Track, untracked

LOGIT_DIFFERENCE = 1e-4
AGREEMENT = 0.999
UNBOUNDED = (
    "the trained model's own logits hold NaN or infinity, perhaps only with the runtime's rounding "
    "of activations, so they limit nothing"
)


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
        if not is_same(before.setdefault(state, logits), logits):
            what = "without an adapter" if state is None else f"with adapter {state.name}"
            yield f"logits {what} differ after other adapters were active"
    runtime.use(None)


@dataclass(frozen=True)
class Rounding:
    """What a runtime's rounding of activations changes in the trained model.

    Args:
        max_abs_logit_difference: with the adapter, or without it on the first sequence; infinite
            if logits then hold NaN or infinity.
        lowest_top1_agreement: see `LogitDifference.lowest_agreement`.
        floor_perplexity_difference: relative, see `perplexity_floor`.
    """

    max_abs_logit_difference: float
    lowest_top1_agreement: float
    floor_perplexity_difference: float


@dataclass(frozen=True)
class WeightsParity:
    """How far a runtime is from the trained model.

    Args:
        max_abs_logit_difference, mean_abs_logit_difference: with the adapter; the largest is
            infinite if logits hold NaN or infinity.
        largest_logit: of the trained model, absolute.
        top1_agreement: share of tokens with the same likeliest next token.
        base_max_abs_logit_difference: without the adapter, on the first sequence.
        off_is_equal: whether switching the adapter off gives the bits of before.
        perplexity, reference_perplexity: of the runtime and of the trained model.
        sequences, tokens: compared.
        shipped_perplexity, shipped_top1_agreement: with the runtime's own settings; None if these
            are the exact ones.
        rounding: what the runtime's rounding of activations does to the trained model; None if it
            computes in float32.
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
    rounding: Rounding | None = None

    @property
    def logit_limit(self) -> float:
        own = 0.0 if self.rounding is None else self.rounding.max_abs_logit_difference
        return LOGIT_DIFFERENCE * self.largest_logit + own

    @property
    def agreement_limit(self) -> float:
        return AGREEMENT if self.rounding is None else self.rounding.lowest_top1_agreement

    def perplexity_limit(self, limits: Limits) -> float:
        own = 0.0 if self.rounding is None else self.rounding.floor_perplexity_difference
        return largest_drift(limits.perplexity_difference, own)

    def to_json(self) -> dict[str, Any]:
        """The fields that were measured, without numbers that are NaN or infinite."""
        return only_finite({k: value for k, value in asdict(self).items() if value is not None})

    def broken_limits(self, limits: Limits) -> Iterator[str]:
        """A sentence for each limit that is exceeded."""
        allowed, least = self.logit_limit, self.agreement_limit
        if not math.isfinite(allowed):
            yield UNBOUNDED
        for what, found in (
            ("with the adapter", self.max_abs_logit_difference),
            ("without it", self.base_max_abs_logit_difference),
        ):
            if not math.isfinite(found):
                yield f"logits {what} hold NaN or infinity"
            elif not found <= allowed:
                yield f"a logit {what} is off by {found:.3g} (limit {allowed:.3g})"
        if not self.top1_agreement >= least:
            yield (
                f"the likeliest token is the same for {self.top1_agreement:.2%} of tokens (limit "
                f"{least:.1%})"
            )
        if not self.off_is_equal:
            yield "after the adapter is switched off, logits differ from those before"
        yield from other_perplexity(
            self.perplexity, self.reference_perplexity, self.perplexity_limit(limits)
        )


def other_perplexity(found: float, expected: float, limit: float, what: str = "") -> Iterator[str]:
    """A sentence, if a perplexity differs from that of the trained model by more than `limit`.

    Args:
        what: was computed, such as " with the adapter".
    """
    if not all(map(math.isfinite, (found, expected, limit))):
        yield f"perplexity{what} is {found:.4f}, expected {expected:.4f} (limit {limit:.2%})"
    elif not (difference := abs(found / expected - 1)) <= limit:
        yield f"perplexity{what} differs by {difference:.2%} (limit {limit:.2%})"


@torch.no_grad()
def verify_weights(
    runtime: WeightsRuntime,
    model: PeftModel,
    adapter: Path,
    sequences: Sequences,
    rounding: AbstractContextManager[None] | None = None,
    track: Track = untracked,
) -> WeightsParity:
    """Compare the runtime's logits on `sequences` with those of the trained `model`.

    Args:
        model: the packed base with the trained adapter.
        adapter: the exported adapter.
        rounding: see `WeightsTarget.rounding`.

    Raises:
        ExportError: the runtime refuses the adapter.
    """
    first = next(sequences.rows())[0][None]
    runtime.use(None)
    before = runtime.logits(first)
    with model.disable_adapter():
        expected = model(input_ids=first).logits.float()
        base, rounded_base = largest((before - expected).abs()), 0.0
        if rounding is not None:
            with rounding:
                rounded_base = largest((model(input_ids=first).logits.float() - expected).abs())
    runtime.use(adapter)
    found, nll, reference_nll, largest_logit = LogitDifference(), 0.0, 0.0, 0.0
    shipped, shipped_nll, rounded = LogitDifference(), 0.0, NoiseFloor()
    for ids, labels in track(sequences.rows(), "verifying", len(sequences)):
        expected = model(input_ids=ids[None]).logits.float()
        logits = runtime.logits(ids[None])
        found.update(logits, expected)
        nll += float(token_losses(logits, labels).sum())
        losses = token_losses(expected, labels)
        reference_nll += float(losses.sum())
        largest_logit = max(largest_logit, largest(expected.abs()))
        if rounding is not None:
            with rounding:
                logits = model(input_ids=ids[None]).logits.float()
            rounded.update(logits, expected)
            rounded.update_losses(token_losses(logits, labels), losses)
        if runtime.shipped is not None:
            logits = runtime.shipped.logits(ids[None])
            shipped.update(logits, expected)
            shipped_nll += float(token_losses(logits, labels).sum())
    runtime.use(None)
    tokens = sequences.loss_tokens
    return WeightsParity(
        max_abs_logit_difference=found.largest,
        mean_abs_logit_difference=found.total / found.count,
        largest_logit=largest_logit,
        top1_agreement=found.agreement,
        base_max_abs_logit_difference=base,
        off_is_equal=is_same(runtime.logits(first), before),
        perplexity=perplexity(nll, tokens),
        reference_perplexity=perplexity(reference_nll, tokens),
        sequences=len(sequences),
        tokens=found.tokens,
        shipped_perplexity=perplexity(shipped_nll, tokens) if shipped.tokens else None,
        shipped_top1_agreement=shipped.agreement if shipped.tokens else None,
        rounding=None
        if rounding is None
        else Rounding(
            max(rounded.largest, rounded_base),
            rounded.lowest_agreement,
            perplexity_floor(rounded.squared_noise, tokens),
        ),
    )
