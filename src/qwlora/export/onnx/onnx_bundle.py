"""Export to ONNX in one call, and the proof of the result in one call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from qwlora.data.sequences import Sequences
from qwlora.export.npu.aimet_encodings import write_encodings
from qwlora.export.onnx.onnx_model import write_onnx
from qwlora.export.onnx.onnx_runtime import OnnxModel
from qwlora.export.onnx.session_options import write_session_options
from qwlora.export.proof.checks import Limits, Parity, check_parity
from qwlora.export.proof.compare import verify_language_model, verify_outputs
from qwlora.export.proof.reference import Reference
from qwlora.graph.quantized_graph import QuantizedGraph
from qwlora.progress import Track, untracked

ENCODINGS_FILE = "model.encodings"
DEFAULT_LIMITS = Limits()


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
        ExportError: ONNX cannot express the graph (see `write_onnx`).
        MissingExtraError: the `onnx` extra is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    transposed = write_onnx(graph, folder, metadata or {})
    write_encodings(graph, folder / ENCODINGS_FILE, transposed)
    write_session_options(graph, folder)


def verify_onnx(
    folder: str | Path,
    reference: Reference,
    sequences: Sequences | Int64[Tensor, "count tokens"],
    layer_tokens: int,
    track: Track = untracked,
    limits: Limits | None = DEFAULT_LIMITS,
) -> Parity:
    """`verify_language_model` for the files in `folder`, run in ONNX Runtime on the CPU.

    Args:
        limits: largest allowed differences; None: measure only.

    Raises:
        VerificationError: a limit is exceeded, or the graph is not that of a causal language model.
        ExportError: ONNX Runtime refuses the files.
    """
    files = OnnxModel(Path(folder))
    parity = verify_language_model(files, reference, sequences, layer_tokens, track)
    if limits is not None:
        check_parity(parity, limits, str(folder))
    return parity


def verify_onnx_outputs(
    folder: str | Path,
    reference: Reference,
    batches: Collection[Any],
    track: Track = untracked,
    limits: Limits | None = DEFAULT_LIMITS,
) -> Parity:
    """`verify_outputs` for the files in `folder`, run in ONNX Runtime on the CPU.

    Args:
        limits: largest allowed differences; None: measure only.

    Raises:
        VerificationError: a limit is exceeded, or `batches` is empty.
        ExportError: ONNX Runtime refuses the files.
    """
    parity = verify_outputs(OnnxModel(Path(folder)), reference, batches, track)
    if limits is not None:
        check_parity(parity, limits, str(folder))
    return parity
