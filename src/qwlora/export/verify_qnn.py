"""The proof of a `qnn` bundle: its graphs on Qualcomm's HTP emulator and on the CPU.

    files       every file has the digest that was recorded; adapters fit the graphs
    CPU         logits against the simulation's, in ONNX Runtime without optimizations
    HTP         the same logits against both, if onnxruntime-qnn is installed; partitions, and
                nodes that fell back to the CPU

The measures and limits are those of `graph_parity.py`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qwlora.atomic import files_in
from qwlora.errors import FingerprintError, MissingExtraError
from qwlora.export.graph_parity import (
    GraphsParity,
    Run,
    agreement,
    compare_graphs,
    logits_sqnr,
    run_of,
)
from qwlora.export.qnn_bundle import base_digest
from qwlora.export.qnn_runtime import BASE, RECORD, QnnModel, require_emulator
from qwlora.export.verify import Limits
from qwlora.formats import manifest
from qwlora.messages import listed
from qwlora.simulation.simulation import Simulation


@dataclass(frozen=True)
class QnnParity(GraphsParity):
    """What a bundle with one adapter computes.

    Args:
        htp: None if the emulator is not installed; `not_run` then says how to install it.
        htp_sqnr, htp_top1_agreement: of the HTP against the CPU.
        placement: by graph, see `QnnModel.placement`.
    """

    htp: Run | None
    htp_sqnr: float | None
    htp_top1_agreement: float | None
    placement: dict[str, dict[str, Any]]
    not_run: str | None

    @property
    def runs(self) -> dict[str, Run]:
        on_htp = {} if self.htp is None else {"the HTP": self.htp}
        return {**super().runs, **on_htp}

    def to_json(self) -> dict[str, Any]:
        found = super().to_json()
        if self.htp is None:  # what the CPU computes is not what the files are for
            del found["perplexity"], found["top1_agreement"]
        return found

    def broken_limits(self, limits: Limits) -> Iterator[str]:
        yield from super().broken_limits(limits)
        for name, found in self.placement.items():
            if found["partitions"] != 1 or found["cpu_nodes"]:
                yield (
                    f"graph {name} has {found['partitions']} partitions on the HTP and "
                    f"{found['cpu_nodes']} nodes on the CPU (limits 1 and 0)"
                )


def check_bundle(folder: Path, name: str) -> None:
    """Compare the files of the graphs and of adapter `name` with what was recorded.

    Raises:
        FingerprintError: a file was changed, added or removed, or the adapter is not one of these
            graphs.
    """
    for part in (folder / BASE, folder / name):
        what = f"{str(part)!r}"
        if not manifest.has_digests(part, RECORD):
            raise FingerprintError(f"{what} has no readable {RECORD}; copy it again")
        manifest.check(part, RECORD, what, "export it again")
        if added := sorted({*files_in(part)} - {*manifest.listed_files(part, RECORD)}):
            raise FingerprintError(
                f"{what} holds files that were not exported: {listed(added)}; remove them"
            )
    record = json.loads((folder / name / RECORD).read_text())
    of_these = record.get("base") == base_digest(folder)
    if record.get("adapter") != name or not of_these:
        raise FingerprintError(
            f"{str(folder / name)!r} holds adapter {record.get('adapter')} of "
            f"{'these' if of_these else 'other'} graphs; copy the whole bundle again"
        )


def verify_qnn(
    folder: Path, name: str, simulation: Simulation, ids: Tensor, steps: int = 0
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
    on_cpu = QnnModel(base, adapter, htp=False).logits(ids, steps)
    expected = simulation.logits(ids)
    parity = compare_graphs(on_cpu, expected, simulation.perturbed_logits(ids), ids)
    on_htp, placement, not_run = None, {}, None
    try:
        require_emulator()
    except MissingExtraError as error:
        not_run = str(error)
    else:
        with tempfile.TemporaryDirectory() as profiles:
            model = QnnModel(base, adapter, htp=True, profiles=Path(profiles))
            on_htp = model.logits(ids, steps)
            placement = model.placement()
    return QnnParity(
        **vars(parity),
        htp=None if on_htp is None else run_of(on_htp, expected, ids),
        htp_sqnr=None if on_htp is None else logits_sqnr(on_htp, on_cpu),
        htp_top1_agreement=None if on_htp is None else agreement(on_htp, on_cpu),
        placement=placement,
        not_run=not_run,
    )
