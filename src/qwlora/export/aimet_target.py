"""The `aimet` target: the `.aimet` folder that Qualcomm AI Hub and aimet-onnx take.

Imports torch and ONNX packages only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.export.held_schemes import encodings_problem
from qwlora.export.target import ExportedGraph, GraphTarget

if TYPE_CHECKING:
    from qwlora.export.verify import Runtime
    from qwlora.grid.scheme import Scheme


class AimetTarget(GraphTarget):
    """`write_aimet` and `FloatOnnxModel` as a target."""

    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
    activation_bitwidths = (8, 16)
    model_files = "model.aimet/*"
    fixed_shapes = True

    def loading(self, base: str, adapter: str | None) -> str:
        if adapter is None:
            return ""
        return (
            f"Base and adapter are one model, `{adapter}/model.aimet`, for AI Hub and aimet-onnx. "
            f"`{adapter}/README.md` has the commands."
        )

    def problem(self, scheme: Scheme) -> str | None:
        return encodings_problem(scheme)

    def write(self, exported: ExportedGraph, folder: Path) -> None:
        from qwlora.export.aimet_folder import write_aimet

        write_aimet(exported, folder)

    def open(self, folder: Path) -> Runtime:
        from qwlora.export.aimet_folder import open_aimet

        return open_aimet(folder)
