"""How far graphs with a key-value cache are from the simulation: a prefill in pieces, then decode.

SQNR is in dB (`grid/sqnr.py`). Files differ from the simulation by what the graphs alone round:
cosines, sines, masked scores. A rounding that falls the other way moves all that follows, so deep
models differ more: with all 30 layers of SmolLM2, two equally correct simulations are 33 dB apart.
The limit is `LEAST_SQNR`, or `BELOW_FLOOR` less than that distance if it is smaller, but at least
`WRONG`: a wrong operator gives less. The limit of the perplexity is that of `verify.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwlora.data.sequences import Sequences
from qwlora.export.cached_graphs import CachedGraphs, most_tokens
from qwlora.export.finite_figures import only_finite, perplexity
from qwlora.export.verify import (
    WRONG,
    Limits,
    Reference,
    broken_perplexity,
    perplexity_floor,
    token_losses,
)
from qwlora.grid.sqnr import sqnr_db
from qwlora.simulation.simulation import Simulation

LEAST_SQNR, BELOW_FLOOR = 30.0, 3.0
EQUAL_SQNR = 200.0  # instead of infinity, which JSON does not hold; float32 ends at about 150
DECODED = 4  # of the last tokens of a sequence: one by one, since an emulator takes seconds


@dataclass(frozen=True)
class Run:
    """Logits of one runtime.

    Args:
        sqnr: against the simulation; NaN if logits hold NaN or infinity, and then not in
            `to_json`.
        top1_agreement: share of tokens with the simulation's likeliest next token.
    """

    perplexity: float
    sqnr: float
    top1_agreement: float


@dataclass(frozen=True)
class GraphsParity:
    """What graphs with one adapter compute in ONNX Runtime on the CPU.

    Args:
        floor_perplexity_difference: see `verify.py`.
        perturbed_sqnr, perturbed_top1_agreement: of a second, equally correct simulation.
    """

    tokens: int
    simulated_perplexity: float
    floor_perplexity_difference: float
    perturbed_sqnr: float
    perturbed_top1_agreement: float
    cpu: Run

    @property
    def runs(self) -> dict[str, Run]:
        """What was computed, by place; the last is the runtime that the files are for."""
        return {"the CPU": self.cpu}

    def to_json(self) -> dict[str, Any]:
        """The fields, without numbers that are NaN or infinite; those of the last run also under
        the names of other targets."""
        last = list(self.runs.values())[-1]
        found = {key: value for key, value in asdict(self).items() if value is not None}
        found |= asdict(last)
        return only_finite(found)

    @property
    def least_sqnr(self) -> float:
        """The limit of `sqnr`, in dB; see the module."""
        return max(WRONG, min(LEAST_SQNR, self.perturbed_sqnr - BELOW_FLOOR))

    def broken_limits(self, limits: Limits) -> Iterator[str]:
        """A sentence for each limit that is exceeded."""
        for place, run in self.runs.items():
            if math.isnan(run.sqnr):
                yield f"logits on {place} hold NaN or infinity"
            elif not run.sqnr >= self.least_sqnr:
                yield f"logits on {place} have {run.sqnr:.1f} dB (limit {self.least_sqnr:.1f} dB)"
            yield from broken_perplexity(
                run.perplexity,
                self.simulated_perplexity,
                self.floor_perplexity_difference,
                limits,
                f" on {place}",
            )


def compare_graphs(found: Tensor, expected: Tensor, perturbed: Tensor, ids: Tensor) -> GraphsParity:
    """Compare logits of ids [1, tokens] with those of two equally correct simulations."""
    change = token_losses(perturbed, ids[0]) - token_losses(expected, ids[0])
    return GraphsParity(
        tokens=ids.shape[1],
        simulated_perplexity=_perplexity(expected, ids),
        floor_perplexity_difference=perplexity_floor(float(change.square().sum()), len(change)),
        perturbed_sqnr=logits_sqnr(perturbed, expected),
        perturbed_top1_agreement=agreement(perturbed, expected),
        cpu=run_of(found, expected, ids),
    )


def verified_part(text: Sequences, folder: Path) -> tuple[Tensor, int]:
    """The first sequence [1, tokens] as far as the context of the graphs in `folder` goes, and how
    many of its last tokens run one by one."""
    ids = text.input_ids[:1, : most_tokens(folder)]
    return ids, min(DECODED, ids.shape[1] - 1)


def verify_graphs(graphs: CachedGraphs, simulation: Reference, text: Sequences) -> GraphsParity:
    """`compare_graphs` of the `verified_part` of a text."""
    assert isinstance(simulation, Simulation)
    ids, steps = verified_part(text, graphs.folder)
    return compare_graphs(
        graphs.logits(ids, steps), simulation.logits(ids), simulation.perturbed_logits(ids), ids
    )


def run_of(found: Tensor, expected: Tensor, ids: Tensor) -> Run:
    """What the logits of a runtime say about ids [1, tokens]."""
    return Run(_perplexity(found, ids), logits_sqnr(found, expected), agreement(found, expected))


def _perplexity(logits: Tensor, ids: Tensor) -> float:
    losses = token_losses(logits, ids[0])
    return perplexity(float(losses.sum()), len(losses))


def logits_sqnr(found: Tensor, expected: Tensor) -> float:
    """In dB; `EQUAL_SQNR` if they are equal, NaN if logits hold NaN or infinity."""
    noise = (found.double() - expected.double()).square().sum()
    return min(sqnr_db(float(expected.double().square().sum()), float(noise)), EQUAL_SQNR)


def agreement(found: Tensor, expected: Tensor) -> float:
    """Share of tokens with the same likeliest next token."""
    same = found.argmax(-1) == expected.argmax(-1)
    return float(torch.mean(same.float()))
