"""The `qairt` target: one base and many LoRA use cases for Qualcomm's QAIRT converter and
importer."""

from __future__ import annotations

from pathlib import Path

from qwlora.export.npu.kv_cache_graphs import GraphsRuntime, read_graphs
from qwlora.export.npu.qairt_check import open_qairt_graphs
from qwlora.export.npu.qairt_folder import write_qairt
from qwlora.export.proof.contents import GOLDEN_FILES, Contents
from qwlora.export.target import Backend, ExportedUseCases


class Qairt(Backend):
    """Float models with encodings and LoRA files for each use case; ONNX Runtime runs them with
    these as Q/DQ nodes."""

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

    def write_cases(self, exported: ExportedUseCases, folder: Path) -> None:
        write_qairt(exported, folder)

    def own_files(self, folder: Path, case: str) -> list[Path]:
        encodings = [f"{graph}_{case}.encodings" for graph in read_graphs(folder)["graphs"]]
        return [folder / name for name in (f"{case}.safetensors", *encodings)]

    def open(self, folder: Path, case: str) -> GraphsRuntime:
        return GraphsRuntime(open_qairt_graphs(folder, case))

    def usage(self, base: str, adapter: str | None, has_cache: bool = True) -> str:
        return (
            f"`{base}` holds base and adapters together, as use cases, for Qualcomm's converter "
            "and LoRA importer."
        )
