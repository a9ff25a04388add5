"""The `onnx` target: a QDQ model for ONNX Runtime, with AIMET encodings and session options.

Imports torch and ONNX packages only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.export.target import ExportedGraph, GraphTarget

if TYPE_CHECKING:
    from qwlora.export.verify import Runtime

_LOADING = """\
Base and adapter are one model, activations on their grids. Pass `session_options.json`: by default
ONNX Runtime quantizes activations to 8 bits on its own.

```python
import json, onnxruntime

options = onnxruntime.SessionOptions()
with open("{adapter}/session_options.json") as file:
    for key, value in json.load(file).items():
        options.add_session_config_entry(key, value)
session = onnxruntime.InferenceSession("{adapter}/model.onnx", options)
```"""


class OnnxTarget(GraphTarget):
    """`export_onnx` and `OnnxModel` as a target."""

    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
    activation_bitwidths = (8, 16)  # QuantizeLinear of opset 21
    model_files = "model.onnx*"

    def loading(self, base: str, adapter: str | None) -> str:
        return "" if adapter is None else _LOADING.format(adapter=adapter)

    def write(self, exported: ExportedGraph, folder: Path) -> None:
        from qwlora.export.onnx_bundle import export_onnx

        export_onnx(exported.simulation.graph(), folder, exported.metadata)

    def open(self, folder: Path) -> Runtime:
        from qwlora.export.onnx_runtime import OnnxModel

        return OnnxModel(folder)
