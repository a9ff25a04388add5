"""The proof of a `qnn` bundle: its graphs on Qualcomm's HTP emulator and on the CPU.

    files       every file has the digest that was recorded; adapters fit the graphs
    CPU         logits against the simulation's, in ONNX Runtime without optimizations
    HTP         the same logits against both, if onnxruntime-qnn is installed; partitions, and
                nodes that fell back to the CPU

SQNR is in dB (`grid/sqnr.py`). The CPU differs from the simulation by what the graphs alone round:
cosines, sines, masked scores. A rounding that falls the other way moves all that follows, so deep
models differ more: with all 30 layers of SmolLM2, two equally correct simulations are 33 dB apart.
The limit is `LEAST_SQNR`, or `BELOW_FLOOR` less than that distance if it is smaller, but at least
`WRONG`: a wrong operator gives less. One sequence has few tokens, so the perplexity may differ by
its limit and twice the standard error of the difference between those two simulations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwlora.atomic import files_in, read_tensors
from qwlora.errors import FingerprintError, MissingExtraError
from qwlora.export.qnn_bundle import base_digest
from qwlora.export.qnn_runtime import (
    ADAPTER,
    BASE,
    GRAPHS,
    RECORD,
    QnnModel,
    read_graphs,
    require_emulator,
)
from qwlora.export.verify import Limits, token_losses
from qwlora.formats import manifest
from qwlora.graph.scaling_input import ALPHA
from qwlora.grid.sqnr import sqnr_db
from qwlora.messages import listed
from qwlora.simulation.simulated_graph import SimulatedGraph

LEAST_SQNR, BELOW_FLOOR, WRONG = 30.0, 3.0, 15.0


@dataclass(frozen=True)
class Run:
    """Logits of one runtime.

    Args:
        sqnr: against the simulation.
        top1_agreement: share of tokens with the simulation's likeliest next token.
    """

    perplexity: float
    sqnr: float
    top1_agreement: float


@dataclass(frozen=True)
class QnnParity:
    """What a bundle with one adapter computes.

    Args:
        perturbed_sqnr, perturbed_top1_agreement: of a second, equally correct simulation.
        perplexity_stderr: of its relative difference from the simulation's perplexity.
        htp: None if the emulator is not installed; `not_run` then says how to install it.
        htp_sqnr, htp_top1_agreement: of the HTP against the CPU.
        placement: by graph, see `QnnModel.placement`.
    """

    tokens: int
    simulated_perplexity: float
    perplexity_stderr: float
    perturbed_sqnr: float
    perturbed_top1_agreement: float
    cpu: Run
    htp: Run | None
    htp_sqnr: float | None
    htp_top1_agreement: float | None
    placement: dict[str, dict[str, Any]]
    not_run: str | None

    def to_json(self) -> dict[str, Any]:
        """The fields; those of `htp` also by themselves, under the names of other targets."""
        found = {key: value for key, value in asdict(self).items() if value is not None}
        if self.htp is not None:
            found["perplexity"] = self.htp.perplexity
            found["top1_agreement"] = self.htp.top1_agreement
        return found

    @property
    def least_sqnr(self) -> float:
        """The limit of `sqnr`, in dB; see the module."""
        return max(WRONG, min(LEAST_SQNR, self.perturbed_sqnr - BELOW_FLOOR))

    def broken_limits(self, limits: Limits) -> Iterator[str]:
        """A sentence for each limit that is exceeded."""
        for place, run in (("the CPU", self.cpu), ("the HTP", self.htp)):
            if run is None:
                continue
            if not run.sqnr >= self.least_sqnr:
                yield f"logits on {place} have {run.sqnr:.1f} dB (limit {self.least_sqnr:.1f} dB)"
            drift = abs(run.perplexity / self.simulated_perplexity - 1)
            if not drift <= limits.perplexity_difference + 2 * self.perplexity_stderr:
                yield (
                    f"perplexity on {place} is {drift:.2%} (standard error "
                    f"{self.perplexity_stderr:.2%}) from the simulation's "
                    f"{self.simulated_perplexity:.4f} (limit {limits.perplexity_difference:.2%} "
                    "and twice the error)"
                )
        for name, found in self.placement.items():
            if found["partitions"] != 1 or found["cpu_nodes"]:
                yield (
                    f"graph {name} has {found['partitions']} partitions on the HTP and "
                    f"{found['cpu_nodes']} nodes on the CPU (limits 1 and 0)"
                )


def check_bundle(folder: Path, name: str) -> None:
    """Compare the files of the graphs and of adapter `name` with what was recorded.

    Raises:
        FingerprintError: a file was changed, added or removed, or the adapter does not fit the
            graphs.
    """
    for part in (folder / BASE, folder / name):
        what = f"{str(part)!r}"
        if not (part / RECORD).is_file() or not manifest.has_digests(part, RECORD):
            raise FingerprintError(f"{what} has no readable {RECORD}; copy it again")
        manifest.check(part, RECORD, what, "export it again")
        known = json.loads((part / RECORD).read_text())[manifest.FILES]
        if added := sorted(set(files_in(part)) - set(known)):
            raise FingerprintError(
                f"{what} holds files that were not exported: {listed(added)}; remove them"
            )
    record = json.loads((folder / name / RECORD).read_text())
    if record.get("adapter") != name or record.get("base") != base_digest(folder):
        raise FingerprintError(
            f"{str(folder / name)!r} holds adapter {record.get('adapter')} of "
            f"{'these' if record.get('base') == base_digest(folder) else 'other'} graphs; "
            "copy the whole bundle again"
        )
    wanted = read_graphs(folder / BASE)["adapter_inputs"]
    tensors, _ = read_tensors(folder / name / ADAPTER)
    found = {key: list(tensor.shape) for key, tensor in tensors.items() if key != ALPHA}
    differing = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    if differing:
        raise FingerprintError(
            f"{str(folder / name / ADAPTER)!r} does not fit the graphs: {differing[0]} is "
            f"{found.get(differing[0])} there and {wanted.get(differing[0])} in {BASE}/{GRAPHS}. "
            "Export the adapter with this base"
        )


def verify_qnn(
    folder: Path, name: str, simulation: SimulatedGraph, ids: Tensor, steps: int = 0
) -> QnnParity:
    """Run a bundle with one adapter, and compare it with the adapter's simulation.

    Args:
        name: of the adapter's folder.
        simulation: of that adapter; of the base for `zero`.
        ids: one sequence [1, tokens], no longer than the context.
        steps: how many of its last tokens to run one by one, with the smallest graph.

    Raises:
        FingerprintError: see `check_bundle`.
        ExportError: a runtime refuses the files.
    """
    check_bundle(folder, name)
    base, adapter = folder / BASE, folder / name
    expected, perturbed = simulation.logits(ids), simulation.perturbed_logits(ids)
    on_cpu = QnnModel(base, adapter, htp=False).logits(ids, steps)
    on_htp, placement, not_run = None, {}, None
    try:
        require_emulator()
    except MissingExtraError as error:
        not_run = str(error)
    else:
        model = QnnModel(base, adapter, htp=True, profile=True)
        on_htp = model.logits(ids, steps)
        placement = model.placement()
    return QnnParity(
        tokens=ids.shape[1],
        simulated_perplexity=_perplexity(expected, ids),
        perplexity_stderr=_standard_error(perturbed, expected, ids),
        perturbed_sqnr=_sqnr(perturbed, expected),
        perturbed_top1_agreement=_agreement(perturbed, expected),
        cpu=_run(on_cpu, expected, ids),
        htp=None if on_htp is None else _run(on_htp, expected, ids),
        htp_sqnr=None if on_htp is None else _sqnr(on_htp, on_cpu),
        htp_top1_agreement=None if on_htp is None else _agreement(on_htp, on_cpu),
        placement=placement,
        not_run=not_run,
    )


def _run(found: Tensor, expected: Tensor, ids: Tensor) -> Run:
    return Run(_perplexity(found, ids), _sqnr(found, expected), _agreement(found, expected))


def _standard_error(found: Tensor, expected: Tensor, ids: Tensor) -> float:
    """Of the mean difference of two models' losses."""
    change = token_losses(found, ids[0]) - token_losses(expected, ids[0])
    return float(change.double().std()) / math.sqrt(len(change))


def _perplexity(logits: Tensor, ids: Tensor) -> float:
    return math.exp(float(token_losses(logits, ids[0]).mean()))


def _sqnr(found: Tensor, expected: Tensor) -> float:
    noise = (found.double() - expected.double()).square().sum()
    return sqnr_db(float(expected.double().square().sum()), float(noise))


def _agreement(found: Tensor, expected: Tensor) -> float:
    same = found.argmax(-1) == expected.argmax(-1)
    return float(torch.mean(same.float()))
