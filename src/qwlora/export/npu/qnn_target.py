"""The `qnn` target: graphs with a key-value cache for Qualcomm's HTP, and adapters as their
inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qwlora.export.npu.kv_cache_graphs import GraphsRuntime
from qwlora.export.npu.qnn_bundle import ZERO, export_qnn
from qwlora.export.npu.qnn_runtime import BASE, QnnModel
from qwlora.export.npu.verify_qnn import check_bundle, verify_qnn
from qwlora.export.proof.checks import Parity
from qwlora.export.target import Backend, ExportedUseCases
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


class QnnRuntime(GraphsRuntime):
    """The graphs with one adapter: logits on the HTP's emulator, layers on the CPU.

    Raises:
        FingerprintError: see `check_bundle`.
    """

    def __init__(self, folder: Path, adapter: str):
        check_bundle(folder, adapter)
        self.folder, self.adapter = folder, adapter
        super().__init__(QnnModel(folder / BASE, folder / adapter, htp=True))

    def layers(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        model = QnnModel(self.folder / BASE, self.folder / self.adapter, htp=False)
        return model.layers_of(tensors)

    def parity(self, reference: Mapping[str, Tensor]) -> Parity:
        return verify_qnn(self.folder, self.adapter, reference)
