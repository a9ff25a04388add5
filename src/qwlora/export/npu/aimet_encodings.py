"""The AIMET encodings file of an exported ONNX model.

    write_encodings          for a QDQ model: version 1.0.0, block scales in the order of the
                             tensor ([in / block, out] for the weight of a MatMul), as in AIMET's
                             own ONNX export
    write_float_encodings    for a float model, as aimet-onnx reads it: 1.0.0 or 2.0.0. In 1.0.0,
                             block scales are in one list, channel by channel, however the tensor
                             is stored; the producer says so (`block_order`)

Every encoding has the name of its ONNX tensor. A weight with float offsets has no encoding in any
AIMET file; its layer is listed in `excluded_layers`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwlora.export.npu.float_onnx import FloatOnnx, TensorEncoding
from qwlora.formats import aimet_encodings as files
from qwlora.formats.aimet_encodings.grids import entry_of
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.grid.scheme import PerTensor

# AIMET's names of observers that it also has; others keep ours, with underscores.
_QUANT_SCHEMES = {
    "min-max": "min_max",
    "sqnr": "post_training_tf_enhanced",
    "percentile": "post_training_percentile",
}


def write_encodings(graph: QuantizedGraph, path: Path, transposed: Collection[str] = ()) -> None:
    """Write every encoding of `graph`, named like the tensors of the ONNX file.

    Args:
        transposed: names of the weights that the ONNX file stores as [in, out].
    """
    marks = sorted(graph.marks, key=lambda mark: mark.kind is not Kind.ACTIVATION)
    tensors = {
        mark.name: TensorEncoding(
            graph.encodings[mark.name], mark.name in transposed, mark.kind is not Kind.ACTIVATION
        )
        for mark in marks
    }
    _write(graph, tensors, path, "1.0.0", "tensor")


def write_float_encodings(float_onnx: FloatOnnx, path: Path, version: str) -> None:
    """Write the encodings of a float model.

    Args:
        version: 1.0.0 or 2.0.0.
    """
    _write(float_onnx.graph, float_onnx.encodings, path, version, "channel")


def _write(
    graph: QuantizedGraph,
    tensors: Mapping[str, TensorEncoding],
    path: Path,
    file_version: str,
    block_order: files.BlockOrder,
) -> None:
    excluded = [n for n, tensor in tensors.items() if tensor.encoding.scheme.float_offset]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in excluded}
    producer = {"package": "qwlora", "version": version("qwlora")}
    sections: dict[str, Any] = {
        "parameters": frozenset(name for name, tensor in tensors.items() if tensor.parameter),
        "excluded_layers": tuple(name.removesuffix(".weight") for name in excluded),
        "quantizer_args": _quantizer_args(graph),
    }
    entries = (
        entry_of(name, tensor.encoding, file_version, tensor.transposed, block_order)
        for name, tensor in tensors.items()
    )
    file = files.EncodingsFile(
        file_version,
        tuple(entries),
        producer=producer | ({"block_order": "channel"} if block_order == "channel" else {}),
        **(sections if file_version < "2" else {}),
    )
    files.write_encodings(file, path)


def _quantizer_args(graph: QuantizedGraph) -> dict[str, Any]:
    """AIMET's settings of a model: first activation grid, first base weight grid, observer."""
    by_kind = {m.kind: graph.encodings[m.name].scheme for m in reversed(graph.marks)}
    activation = by_kind.get(Kind.ACTIVATION)
    weight = by_kind.get(Kind.BASE, by_kind.get(Kind.PARAMETER))
    return {
        "activation_bitwidth": activation.bitwidth if activation else 32,
        "dtype": "int",
        "is_symmetric": weight.symmetric if weight else True,
        "param_bitwidth": weight.bitwidth if weight else 32,
        "per_channel_quantization": weight is not None
        and not isinstance(weight.granularity, PerTensor),
        "quant_scheme": _QUANT_SCHEMES.get(graph.observer, graph.observer.replace("-", "_")),
    }
