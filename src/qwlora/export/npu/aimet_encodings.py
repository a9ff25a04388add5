"""The AIMET encodings file of an exported ONNX model.

    write_encodings          beside a QDQ model: version 1.0.0, block scales in the order of the
                             tensor ([in / block, out] for the weight of a MatMul), as in AIMET's
                             own ONNX export
    write_float_encodings    beside a float model, for aimet-onnx: 1.0.0 or 2.0.0. In 1.0.0, block
                             scales are in one list, channel by channel, however the tensor is
                             stored; the producer says so (`block_order`)

Every encoding has the name of its ONNX tensor. A weight with float offsets has no encoding in any
AIMET file; its layer is listed in `excluded_layers`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwlora import encodings as files
from qwlora.encodings.grids import entry_of
from qwlora.export.npu.float_onnx import TensorEncoding
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.grid.scheme import PerTensor

VERSION = "1.0.0"
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
    activations = [m.name for m in graph.marks if m.kind is Kind.ACTIVATION]
    weights = [m.name for m in graph.marks if m.kind is not Kind.ACTIVATION]
    parameters = [name for name in weights if not graph.encodings[name].scheme.float_offset]
    file = files.EncodingsFile(
        VERSION,
        tuple(
            entry_of(name, graph.encodings[name], VERSION, name in transposed)
            for name in [*activations, *parameters]
        ),
        parameters=frozenset(parameters),
        excluded_layers=tuple(
            name.removesuffix(".weight") for name in weights if name not in parameters
        ),
        quantizer_args=_quantizer_args(graph),
        producer={"package": "qwlora", "version": version("qwlora")},
    )
    files.write_encodings(file, path)


def write_float_encodings(
    graph: QuantizedGraph, tensors: Mapping[str, TensorEncoding], path: Path, version_: str
) -> None:
    """Write the encodings of a float model.

    Args:
        graph: where the model comes from.
        tensors: grids by name of the tensor; see `FloatOnnx`.
        version_: 1.0.0 or 2.0.0.
    """
    sections = version_ < "2"
    file = files.EncodingsFile(
        version_,
        tuple(
            entry_of(name, found.encoding, version_, found.transposed, "channel")
            for name, found in tensors.items()
        ),
        parameters=frozenset(n for n, t in tensors.items() if t.parameter) if sections else None,
        excluded_layers=() if sections else None,
        quantizer_args=_quantizer_args(graph) if sections else None,
        producer={"package": "qwlora", "version": version("qwlora"), "block_order": "channel"},
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
