"""The `onnx` target: a QDQ model for ONNX Runtime with all adapters, and AIMET encodings. The
`onnx_each` target: a whole model for each adapter, for adapters that cannot be switched.

    base/model.onnx, model.onnx.data    the base; see `adapters_as_inputs.py`
    base/session_options.json           options without which results differ
    base/model.encodings
    NAME/adapter.onnx_adapter           what the adapter changes; a run applies it
    NAME/model.encodings

    NAME/model.onnx, model.onnx.data, session_options.json, model.encodings    of `onnx_each`
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwlora.errors import CaptureError
from qwlora.export.npu.aimet_encodings import write_encodings
from qwlora.export.onnx.adapters_as_inputs import write_adapter, write_switchable
from qwlora.export.onnx.onnx_edits import DATA_FILE, MODEL_FILE, save_graph
from qwlora.export.onnx.onnx_model import build_model
from qwlora.export.onnx.onnx_runtime import (
    OPTIONS_FILE,
    OPTIONS_FORM,
    OnnxModel,
    write_session_options,
)
from qwlora.export.proof.contents import ADAPTER_FILE, SIMULATED_ADAPTER, TOKENIZER, Contents
from qwlora.export.target import Backend, ExportedGraph
from qwlora.graph.quantized_graph import QuantizedGraph
from qwlora.simulation.kv_cache_graph import cached_graph, capture_with_cache
from qwlora.simulation.simulation import Simulation

ENCODINGS_FILE = "model.encodings"


def export_onnx(
    graph: QuantizedGraph, folder: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write everything that ONNX Runtime and AIMET's tools need into `folder`.

        model.onnx, model.onnx.data    the model with QuantizeLinear and DequantizeLinear nodes
        model.encodings                AIMET 1.0.0
        session_options.json           ONNX Runtime options without which results differ

    Args:
        metadata: added to the metadata of the ONNX file.

    Raises:
        ExportError: ONNX cannot express the graph (see `build_model`).
        MissingExtraError: the `onnx` extra is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model, transposed = build_model(graph, metadata or {})
    save_graph(model, folder / MODEL_FILE)
    write_encodings(graph, folder / ENCODINGS_FILE, transposed)
    write_session_options(graph, folder)


class Onnx(Backend):
    """One model for the base and all adapters; ONNX Runtime runs it."""

    contents = Contents(
        base=(MODEL_FILE, DATA_FILE, ENCODINGS_FILE, OPTIONS_FILE, *TOKENIZER),
        adapter=(ADAPTER_FILE, ENCODINGS_FILE, *SIMULATED_ADAPTER),
        forms={OPTIONS_FILE: OPTIONS_FORM},
    )

    def write_base(self, exported: ExportedGraph, folder: Path) -> str | None:
        assert isinstance(exported.simulation, Simulation)
        try:
            captured, reason = capture_with_cache(exported.simulation), None
            graph = cached_graph(exported.simulation, captured, quantize_past=False)
        except CaptureError as error:
            graph, reason = exported.simulation.graph(), str(error)
        base_activations = exported.updatable == "all"
        transposed = write_switchable(graph, folder, exported.metadata, base_activations)
        write_encodings(graph, folder / ENCODINGS_FILE, transposed)
        write_session_options(graph, folder)
        return reason

    def write_adapter(self, exported: ExportedGraph, base: Path, folder: Path) -> None:
        graph = exported.simulation.graph()
        write_encodings(graph, folder / ENCODINGS_FILE, write_adapter(graph, base, folder))

    def open(self, folder: Path, case: str) -> OnnxModel:
        runtime = OnnxModel(folder, switches=True)
        _ = runtime.session  # loaded here, so that it is refused here
        return runtime


class OnnxEach(Backend):
    """A model for each adapter; ONNX Runtime runs it."""

    def write_adapter(self, exported: ExportedGraph, base: Path, folder: Path) -> None:
        export_onnx(exported.simulation.graph(), folder, exported.metadata)

    def open(self, folder: Path, case: str) -> OnnxModel:
        return OnnxModel(folder)
