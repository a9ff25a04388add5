"""The `aimet` target: the `.aimet` folder that Qualcomm AI Hub and aimet-onnx take.

Imports torch and ONNX packages only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.export.format_limits import encodings_problem
from qwlora.export.proof.contents import GOLDEN_FILES, SIMULATED_ADAPTER, Contents
from qwlora.export.target import ExportedGraph, GraphTarget

if TYPE_CHECKING:
    from torch import Tensor

    from qwlora.export.npu.float_graphs import FloatGraphs
    from qwlora.export.runtime import Runtime
    from qwlora.grid.scheme import Scheme


class AimetTarget(GraphTarget):
    """`write_aimet` and `open_aimet_graphs` as a target."""

    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
    activation_bitwidths = (8, 16)
    model_files = "*.aimet/*"
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
    cached_graphs = True
    has_proof = True

    def loading(self, base: str, adapter: str | None) -> str:
        if adapter is None:
            return ""
        return (
            f"Base and adapter are one model, `{adapter}/*.aimet`, for AI Hub and aimet-onnx. "
            f"`{adapter}/README.md` has the commands."
        )

    def problem(self, scheme: Scheme) -> str | None:
        return encodings_problem(scheme)

    def write(self, exported: ExportedGraph, folder: Path) -> None:
        from qwlora.export.npu.aimet_folder import write_aimet

        write_aimet(exported, folder)

    def open(self, folder: Path) -> Runtime:
        """A model that is no causal language model; the others are graphs with a cache."""
        from qwlora.export.npu.aimet_folder import open_aimet

        return open_aimet(folder)

    def logits(self, folder: Path, steps: int = 0) -> Callable[[Tensor], Tensor]:
        return partial(_graphs(folder).logits, steps=steps)

    def call_tokens(self, folder: Path) -> int:
        from qwlora.export.npu.kv_cache_graphs import largest_call

        return largest_call(folder)

    def layers(
        self, folder: Path, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        return _graphs(folder).layers_of(tensors)

    def whole(self, folder: Path) -> Runtime | None:
        return None


def _graphs(folder: Path) -> FloatGraphs:
    from qwlora.export.npu.aimet_folder import open_aimet_graphs

    return open_aimet_graphs(folder)
