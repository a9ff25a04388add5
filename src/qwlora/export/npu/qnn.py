"""The `qnn` target: graphs with a key-value cache for Qualcomm's HTP, and adapters as their inputs.

It is proven by its graphs on the CPU and on Qualcomm's HTP emulator:

    files       every file has the digest that was recorded; adapters fit the graphs
    CPU         in ONNX Runtime without optimizations
    HTP         if onnxruntime-qnn is installed; also partitions, and nodes left to the CPU

The logits are compared as those of all targets, see `proof/compare.py`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qwlora.atomic import files_in
from qwlora.errors import FingerprintError, MissingExtraError
from qwlora.export.npu.qnn_bundle import base_digest, export_qnn
from qwlora.export.npu.qnn_runtime import BASE, RECORD, ZERO, QnnModel, require_emulator
from qwlora.export.proof.checks import Check, Limits, Parity, at_most
from qwlora.export.proof.compare import compare_logits
from qwlora.export.proof.reference import first_sequences
from qwlora.export.target import Backend, ExportedUseCases
from qwlora.formats import manifest
from qwlora.messages import listed
from qwlora.simulation.simulation import Simulation

NONE = "none"  # the use case whose adapter is in folder `zero`


class Qnn(Backend):
    """QDQ graphs; the HTP's emulator runs them, and ONNX Runtime on the CPU."""

    def write_cases(self, exported: ExportedUseCases, folder: Path) -> None:
        simulations = {}
        for case, graph in exported.cases.items():
            assert isinstance(graph.simulation, Simulation)
            if case != NONE:
                simulations[case] = graph.simulation
        base = exported.base
        export_qnn(simulations, base.graphs, base.context, folder, base.metadata)

    def own_files(self, folder: Path, case: str) -> list[Path]:
        return list((folder / _folder(case)).iterdir())

    def open(self, folder: Path, case: str) -> QnnRuntime:
        return QnnRuntime(folder, _folder(case))

    def usage(self, base: str, adapter: str | None, has_cache: bool = True) -> str:
        return (
            f"`{base}` holds graphs with a key-value cache for Qualcomm's HTP, and a folder for "
            "each adapter, whose tensors are inputs of the graphs."
        )


def _folder(case: str) -> str:
    return ZERO if case == NONE else case


class QnnRuntime(QnnModel):
    """The graphs with one adapter, on the HTP's emulator.

    Raises:
        FingerprintError: see `check_bundle`.
    """

    def __init__(self, bundle: Path, adapter: str):
        check_bundle(bundle, adapter)
        super().__init__(bundle / BASE, bundle / adapter, htp=True)
        self.bundle, self.adapter = bundle, adapter

    def parity(self, reference: Mapping[str, Tensor]) -> Parity:
        return verify_qnn(self.bundle, self.adapter, reference)


DECODED = 4  # of the last tokens of a sequence: one by one, since the emulator takes seconds


@dataclass(frozen=True)
class Placement:
    """Where the nodes of one graph run, see `QnnModel.placement`."""

    graph: str
    partitions: int
    cpu_nodes: int

    def checks(self, limits: Limits) -> Iterator[Check]:
        yield at_most(f"partitions of graph {self.graph} on the HTP", self.partitions, 1)
        yield at_most(f"nodes of graph {self.graph} on the CPU", self.cpu_nodes, 0)


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


def verify_qnn(folder: Path, name: str, reference: Mapping[str, Tensor]) -> Parity:
    """Run the first sequence of a reference with one adapter.

    Args:
        name: of the adapter's folder.

    Returns:
        figures of the CPU and, if the emulator is installed, of the HTP; `exact` has those of the
        last. Otherwise `not_run` says how to install it.

    Raises:
        FingerprintError: see `check_bundle`.
        ExportError: a runtime refuses the files.
    """
    check_bundle(folder, name)
    base, adapter = folder / BASE, folder / name
    one = first_sequences(reference, 1)
    steps = min(DECODED, one["ids"].shape[1] - 1)
    on_cpu = partial(QnnModel(base, adapter, htp=False).logits, steps=steps)
    run = compare_logits(on_cpu, one, where=" on the CPU")
    parity = Parity({"cpu": run.to_json(), "exact": {"adapter": run.to_json()}}, (run,))
    try:
        require_emulator()
    except MissingExtraError as error:
        return parity.extended({"not_run": str(error)})
    with tempfile.TemporaryDirectory() as profiles:
        model = QnnModel(base, adapter, htp=True, profiles=Path(profiles))
        run = compare_logits(partial(model.logits, steps=steps), one, where=" on the HTP")
        placement = model.placement()
    figures: dict[str, Any] = {"htp": run.to_json(), "exact": {"adapter": run.to_json()}}
    places = [Placement(n, p["partitions"], p["cpu_nodes"]) for n, p in placement.items()]
    return parity.extended({**figures, "placement": placement}, run, *places)
