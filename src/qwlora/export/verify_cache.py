"""The proof of a key-value cache: a prefill, then tokens one by one, against the simulation of the
whole sequence.

    alone       the logits of the tokens that were run one by one, compared with the simulation's
    switched    the same again, bit for bit, while other adapters and the base run between the
                steps, each with a cache of its own

On a grid, the same sums in another order can round to another step, so two correct computations of
one sequence differ. The files may be `Limits.below_floor` dB further from the simulation than
either of two others: a second simulation, and the files' own run of the whole sequence, which is
verified by itself. At least `WRONG` dB are needed in any case.

    SQNR = 10 log10(sum x^2 / sum (x - x_hat)^2) in dB, x simulated, x_hat from the files
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwlora.export.finite_figures import is_same, only_finite
from qwlora.export.graph_parity import logits_sqnr
from qwlora.export.proof import DECODED
from qwlora.export.verify import WRONG, Limits, LogitDifference, Reference
from qwlora.export.verify_weights import SwitchableRuntime

_OTHERS = 2  # states that run between the steps


@dataclass(frozen=True)
class CacheParity:
    """How far tokens that were run one by one are from the simulation of the whole sequence.

    Args:
        prefilled, tokens: how many were run at once before, and one by one.
        sqnr: dB, of the logits of the latter; NaN if they hold NaN or infinity, and then not
            in `to_json`.
        floor_sqnr: the lower one of the two others; see the module.
        switched_is_equal: whether switching adapters between the steps changes no bit.
    """

    prefilled: int
    tokens: int
    sqnr: float
    floor_sqnr: float
    top1_agreement: float
    max_abs_logit_difference: float
    switched_is_equal: bool

    def least_sqnr(self, limits: Limits) -> float:
        """The limit of `sqnr`, in dB."""
        return max(WRONG, min(limits.sqnr, self.floor_sqnr - limits.below_floor))

    def to_json(self) -> dict[str, Any]:
        """The fields, without numbers that are NaN or infinite."""
        return only_finite(asdict(self))

    def broken_limits(self, limits: Limits) -> Iterator[str]:
        """A sentence for each limit that is exceeded."""
        least = self.least_sqnr(limits)
        if math.isnan(self.sqnr):
            yield "with the cache, logits hold NaN or infinity"
        elif not self.sqnr >= least:
            yield (
                f"with the cache, logits are {self.sqnr:.1f} dB from those of the whole sequence "
                f"(limit {least:.1f} dB, floor {self.floor_sqnr:.1f} dB)"
            )
        if not self.switched_is_equal:
            yield "with the cache, logits differ if other adapters run between the steps"


def verify_cache(
    runtime: SwitchableRuntime,
    reference: Reference,
    ids: Tensor,
    adapter: Path | None,
    others: Sequence[Path],
) -> CacheParity:
    """Run one sequence in steps, and compare it.

    Args:
        reference: the simulation of the adapter; with None, of a zero adapter.
        ids: token ids [1, tokens], at least two.
        adapter: folder of an adapter; None: the base.
        others: folders of further adapters.
    """
    count = min(DECODED, ids.shape[1] - 1)
    batch, primary = {"input_ids": ids}, reference.graph().interface.primary
    expected = reference.outputs(batch)[primary][:, -count:]
    perturbed = reference.perturbed_outputs(batch)[primary][:, -count:]
    runtime.use(adapter)
    whole = runtime.logits(ids)[:, -count:]
    found = _stepwise(runtime, adapter, [], ids, count)
    states = [state for state in (None, *others) if state != adapter]
    switched = _stepwise(runtime, adapter, states[:_OTHERS], ids, count)
    runtime.use(None)
    difference = LogitDifference()
    difference.update(found, expected)
    return CacheParity(
        prefilled=ids.shape[1] - count,
        tokens=count,
        sqnr=logits_sqnr(found, expected),
        floor_sqnr=min(logits_sqnr(perturbed, expected), logits_sqnr(whole, expected)),
        top1_agreement=difference.agreement,
        max_abs_logit_difference=difference.largest,
        switched_is_equal=is_same(found, switched),
    )


def _stepwise(
    runtime: SwitchableRuntime,
    adapter: Path | None,
    between: Sequence[Path | None],
    ids: Tensor,
    count: int,
) -> Tensor:
    """Logits of the last `count` tokens, run one by one.

    Args:
        between: states that run the same tokens between the steps.
    """
    states = (adapter, *between)
    caches: list[dict[str, Tensor]] = [{} for _ in states]
    found = []
    for part in (ids[:, :-count], *ids[:, -count:].split(1, dim=1)):
        for number, state in enumerate(states):
            runtime.use(state)
            logits, caches[number] = runtime.extend(part, caches[number])
            if number == 0:
                found.append(logits)
    return torch.cat(found[1:], dim=1)
