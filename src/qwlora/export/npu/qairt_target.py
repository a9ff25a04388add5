"""The `qairt` target: one base and many LoRA use cases for Qualcomm's QAIRT converter and importer.

Imports torch and ONNX packages only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.export.format_limits import encodings_problem
from qwlora.export.proof.contents import GOLDEN_FILES, Contents
from qwlora.export.target import ExportedUseCases, UseCasesTarget

if TYPE_CHECKING:
    from torch import Tensor

    from qwlora.export.npu.float_graphs import FloatGraphs
    from qwlora.grid.scheme import Scheme


class QairtTarget(UseCasesTarget):
    """`write_qairt` and `open_qairt` as a target."""

    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
    activation_bitwidths = (8, 16)
    reserved = frozenset({"none", "base", "model", "host"})
    cached_graphs = True
    has_proof = True
    contents = Contents(
        adapter=(
            "*model.onnx",
            "*_host.onnx",
            "model.data",
            "*.encodings",
            "*.safetensors",
            "*.yaml",
            "*lora_weight_list.txt",
            "graphs.json",
            *GOLDEN_FILES,
        )
    )

    def loading(self, base: str, adapter: str | None) -> str:
        return (
            f"`{base}` holds base and adapters together, as use cases, for Qualcomm's converter "
            "and LoRA importer."
        )

    def problem(self, scheme: Scheme) -> str | None:
        return encodings_problem(scheme)

    def write(self, exported: ExportedUseCases, folder: Path) -> None:
        from qwlora.export.npu.qairt_folder import write_qairt

        write_qairt(exported, folder)

    def own_files(self, folder: Path, case: str) -> list[Path]:
        from qwlora.export.npu.kv_cache_graphs import read_graphs

        encodings = [f"{graph}_{case}.encodings" for graph in read_graphs(folder)["graphs"]]
        return [folder / name for name in (f"{case}.safetensors", *encodings)]

    def logits(self, folder: Path, case: str, steps: int = 0) -> Callable[[Tensor], Tensor]:
        return partial(_graphs(folder, case).logits, steps=steps)

    def call_tokens(self, folder: Path) -> int:
        from qwlora.export.npu.kv_cache_graphs import largest_call

        return largest_call(folder)

    def layers(
        self, folder: Path, case: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        return _graphs(folder, case).layers_of(tensors)


def _graphs(folder: Path, case: str) -> FloatGraphs:
    from qwlora.export.npu.qairt_check import open_qairt_graphs

    return open_qairt_graphs(folder, case)
