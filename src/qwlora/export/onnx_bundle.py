"""Everything that one target needs, in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwlora.export.aimet_encodings import write_encodings
from qwlora.export.onnx_model import write_onnx
from qwlora.export.onnx_runtime import write_session_options
from qwlora.graph.quantized_graph import QuantizedGraph

ENCODINGS_FILE = "model.encodings"


def export_onnx(
    graph: QuantizedGraph, folder: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `model.onnx` (with its external data), `model.encodings` (AIMET 1.0.0) and `session_options.json` into `folder`.

    Args:
        metadata: goes into the ONNX file's metadata.

    Raises:
        ExportError: see `write_onnx`.
        MissingExtraError: the `onnx` extra is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    transposed = write_onnx(graph, folder, metadata or {})
    write_encodings(graph, folder / ENCODINGS_FILE, transposed)
    write_session_options(graph, folder)
