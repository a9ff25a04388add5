"""The `onnx` target: a QDQ model for ONNX Runtime, with AIMET encodings and session options.

Imports torch and ONNX packages only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.export.target import GraphTarget

if TYPE_CHECKING:
    from qwlora.export.verify import Runtime
    from qwlora.graph.quantized_graph import QuantizedGraph


class OnnxTarget(GraphTarget):
    """`export_onnx` and `OnnxModel` as a target."""

    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
    activation_bitwidths = (8, 16)  # QuantizeLinear of opset 21
    model_files = "model.onnx*"

    def write(self, graph: QuantizedGraph, folder: Path, metadata: Mapping[str, str]) -> None:
        from qwlora.export.onnx_bundle import export_onnx

        export_onnx(graph, folder, metadata)

    def open(self, folder: Path) -> Runtime:
        from qwlora.export.onnx_runtime import OnnxModel

        return OnnxModel(folder)
