"""The `aimet` target: the `.aimet` folder that Qualcomm AI Hub and aimet-onnx take."""

from __future__ import annotations

from pathlib import Path

from qwlora.export.npu.aimet_folder import open_aimet, open_aimet_graphs, write_aimet
from qwlora.export.npu.kv_cache_graphs import GraphsRuntime, has_graphs
from qwlora.export.proof.contents import GOLDEN_FILES, SIMULATED_ADAPTER, Contents
from qwlora.export.runtime import Runtime
from qwlora.export.target import Backend, ExportedGraph


class Aimet(Backend):
    """Float models with encodings; ONNX Runtime runs them with these as Q/DQ nodes."""

    contents = Contents(
        adapter=(
            "*.aimet/model.onnx",
            "*.aimet/model.data",
            "*.aimet/model.encodings",
            "*_host.onnx",
            "graphs.json",
            "submit_aihub.py",
            *GOLDEN_FILES,
            *SIMULATED_ADAPTER,
        ),
        scripts={"submit_aihub.py": "npu/aimet_templates/submit_aihub.py.template"},
    )

    def write_adapter(self, exported: ExportedGraph, base: Path, folder: Path) -> None:
        write_aimet(exported, folder)

    def open(self, folder: Path, case: str) -> Runtime:
        if has_graphs(folder):
            return GraphsRuntime(open_aimet_graphs(folder))
        return open_aimet(folder)

    def usage(self, base: str, adapter: str | None, has_cache: bool = True) -> str:
        if adapter is None:
            return ""
        return (
            f"Base and adapter are one model, `{adapter}/*.aimet`, for AI Hub and aimet-onnx. "
            f"`{adapter}/README.md` has the commands."
        )
