"""The `onnx` target: a QDQ model for ONNX Runtime with all adapters, and AIMET encodings. The
`onnx_each` target: a whole model for each adapter, for adapters that cannot be switched.

    base/model.onnx, model.onnx.data    the base; see `switchable_graph.py`
    base/session_options.json           options without which results differ
    base/model.encodings
    NAME/adapter.onnx_adapter           what the adapter changes; a run applies it
    NAME/model.encodings

    NAME/model.onnx, model.onnx.data, session_options.json, model.encodings    of `onnx_each`

Imports torch and ONNX packages only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.export.target import ExportedGraph, GraphTarget, SwitchableTarget

if TYPE_CHECKING:
    from qwlora.export.verify import Runtime
    from qwlora.export.verify_weights import SwitchableRuntime
    from qwlora.simulation.shared_encodings import BaseActivations

_LOADING = """\
Activations are on their grids. Pass `session_options.json`: by default ONNX Runtime quantizes
activations to 8 bits on its own.

```python
import json, onnxruntime

options = onnxruntime.SessionOptions()
with open("{base}/session_options.json") as file:
    for key, value in json.load(file).items():
        options.add_session_config_entry(key, value)
session = onnxruntime.InferenceSession("{base}/model.onnx", options){adapter}
# logits = session.run(["logits"], {{"input_ids": ids, "attention_mask": mask}}{given})
```"""
_ADAPTER = """
adapter, run = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
adapter.Load("{adapter}/adapter.onnx_adapter")
run.add_active_adapter(adapter)  # without `run`, the session computes the base"""


class OnnxTarget(SwitchableTarget):
    """`write_switchable`, `write_adapter` and `OnnxModel` as a target."""

    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
    activation_bitwidths = (8, 16)  # QuantizeLinear of opset 21

    def loading(self, base: str, adapter: str | None) -> str:
        if adapter is None:
            return _LOADING.format(base=base, adapter="", given="")
        return _LOADING.format(base=base, adapter=_ADAPTER.format(adapter=adapter), given=", run")

    def write_base(self, exported: ExportedGraph, updatable: BaseActivations, folder: Path) -> None:
        from qwlora.export.aimet_encodings import write_encodings
        from qwlora.export.onnx_bundle import ENCODINGS_FILE
        from qwlora.export.onnx_runtime import write_session_options
        from qwlora.export.switchable_graph import write_switchable

        graph = exported.simulation.graph()
        transposed = write_switchable(graph, folder, exported.metadata, updatable == "all")
        write_encodings(graph, folder / ENCODINGS_FILE, transposed)
        write_session_options(graph, folder)

    def write_adapter(self, exported: ExportedGraph, base: Path, folder: Path) -> None:
        from qwlora.export.aimet_encodings import write_encodings
        from qwlora.export.onnx_bundle import ENCODINGS_FILE
        from qwlora.export.switchable_graph import write_adapter

        graph = exported.simulation.graph()
        write_encodings(graph, folder / ENCODINGS_FILE, write_adapter(graph, base, folder))

    def open(self, folder: Path) -> SwitchableRuntime:
        from qwlora.export.onnx_runtime import OnnxModel

        runtime = OnnxModel(folder)
        _ = runtime.session  # loaded here, so that it is refused here
        return runtime


class OnnxEachTarget(GraphTarget):
    """`export_onnx` and `OnnxModel` as a target."""

    extra = OnnxTarget.extra
    packages = OnnxTarget.packages
    activation_bitwidths = OnnxTarget.activation_bitwidths
    model_files = "model.onnx*"

    def loading(self, base: str, adapter: str | None) -> str:
        return "" if adapter is None else _LOADING.format(base=adapter, adapter="", given="")

    def write(self, exported: ExportedGraph, folder: Path) -> None:
        from qwlora.export.onnx_bundle import export_onnx

        export_onnx(exported.simulation.graph(), folder, exported.metadata)

    def open(self, folder: Path) -> Runtime:
        from qwlora.export.onnx_runtime import OnnxModel

        return OnnxModel(folder)
