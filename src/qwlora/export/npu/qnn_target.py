"""The `qnn` target: graphs with a key-value cache for Qualcomm's HTP, and adapters as their inputs.

Imports torch and ONNX packages only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.errors import MissingExtraError
from qwlora.export.npu.htp_limits import table_problem, weight_problem
from qwlora.export.target import ExportedUseCases, UseCasesTarget
from qwlora.system.optional_packages import require

if TYPE_CHECKING:
    from torch import Tensor

    from qwlora.export.proof.checks import Parity
    from qwlora.grid.scheme import Scheme
    from qwlora.progress import Track

NONE, ZERO = "none", "zero"  # a use case, and the folder of its adapter


class QnnTarget(UseCasesTarget):
    """`export_qnn` and `verify_qnn` as a target."""

    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
    activation_bitwidths = (16,)
    reserved = frozenset({NONE, ZERO, "base"})
    cached_graphs = True
    compiled = True

    def loading(self, base: str, adapter: str | None) -> str:
        return (
            f"`{base}` holds graphs with a key-value cache for Qualcomm's HTP, and a folder for "
            "each adapter, whose tensors are inputs of the graphs."
        )

    def problem(self, scheme: Scheme) -> str | None:
        found = weight_problem(scheme)
        return found and f"{scheme}: {found}"

    def embedding_problem(self, scheme: Scheme) -> str | None:
        found = table_problem(scheme)
        return found and f"{scheme} of an embedding: {found}"

    def missing(self) -> str | None:
        """Also whether the compiler and the emulator are missing."""
        if (found := super().missing()) is not None:
            return found
        try:
            require("onnxruntime_qnn", "qnn")
        except MissingExtraError as error:
            return str(error)
        return None

    def write(self, exported: ExportedUseCases, folder: Path) -> None:
        from qwlora.export.npu.qnn_bundle import export_qnn
        from qwlora.simulation.simulation import Simulation

        simulations = {}
        for case, graph in exported.cases.items():
            assert isinstance(graph.simulation, Simulation)
            if case != NONE:
                simulations[case] = graph.simulation
        base = exported.base
        export_qnn(simulations, base.graphs, base.context, folder, base.metadata)

    def own_files(self, folder: Path, case: str) -> list[Path]:
        return list((folder / _folder(case)).iterdir())

    def logits(self, folder: Path, case: str, steps: int = 0) -> Callable[[Tensor], Tensor]:
        from qwlora.export.npu.qnn_runtime import BASE, QnnModel
        from qwlora.export.npu.verify_qnn import check_bundle

        check_bundle(folder, _folder(case))
        model = QnnModel(folder / BASE, folder / _folder(case), htp=True)
        return partial(model.logits, steps=steps)

    def call_tokens(self, folder: Path) -> int:
        from qwlora.export.npu.kv_cache_graphs import largest_call
        from qwlora.export.npu.qnn_runtime import BASE

        return largest_call(folder / BASE)

    def layers(
        self, folder: Path, case: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        from qwlora.export.npu.qnn_runtime import BASE, QnnModel
        from qwlora.export.npu.verify_qnn import check_bundle

        check_bundle(folder, _folder(case))
        model = QnnModel(folder / BASE, folder / _folder(case), htp=False)
        return model.layers_of(tensors)

    def verify(
        self, folder: Path, case: str, reference: Mapping[str, Tensor], track: Track
    ) -> Parity:
        from qwlora.export.npu.verify_qnn import verify_qnn

        return verify_qnn(folder, _folder(case), reference)


def _folder(case: str) -> str:
    return ZERO if case == NONE else case
