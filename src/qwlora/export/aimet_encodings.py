"""AIMET encodings files, version 1.0.0.

Top level: `version`, `activation_encodings`, `param_encodings` (lists), `excluded_layers`, `quantizer_args`, `producer`. An entry:

    {name, dtype: "INT", bw, is_sym, enc_type: PER_TENSOR | PER_CHANNEL | PER_BLOCK, scale: [...], offset: [...][, block_size]}

Codes are unsigned there: `real = (q + offset) * scale`, so a symmetric grid has `offset = -2^(bw - 1)`, which is this project's convention too. Scales of a
block-wise weight are listed as the ONNX tensor of that name lies ([in / block, out] for the weight of a MatMul), as AIMET's own ONNX export does; the version
has no field that says so.

A weight with float offsets has no encoding in any AIMET file; its layer is listed in `excluded_layers`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.grid.encoding import Encoding
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, PerTensor

VERSION = "1.0.0"


def write_encodings(graph: QuantizedGraph, path: Path, transposed: Collection[str] = ()) -> None:
    """Write every encoding of `graph`, under the names that the ONNX file's tensors carry.

    Args:
        transposed: names of the weights that the ONNX file stores as [in, out].
    """
    activations = [m.name for m in graph.marks if m.kind is Kind.ACTIVATION]
    weights = [m.name for m in graph.marks if m.kind is not Kind.ACTIVATION]
    parameters = [name for name in weights if isinstance(graph.encodings[name], Encoding)]
    record = {
        "version": VERSION,
        "producer": {"package": "qwlora", "version": version("qwlora")},
        "activation_encodings": [
            encoding_to_entry(name, _integer(graph, name)) for name in activations
        ],
        "param_encodings": [
            encoding_to_entry(name, _integer(graph, name), name in transposed)
            for name in parameters
        ],
        "excluded_layers": [
            name.removesuffix(".weight") for name in weights if name not in parameters
        ],
        "quantizer_args": _quantizer_args(graph),
    }
    path.write_text(json.dumps(record) + "\n")


def encoding_to_entry(name: str, encoding: Encoding, transposed: bool = False) -> dict[str, Any]:
    """One entry of the file."""
    scheme, scale, offset = encoding.scheme, encoding.scale, encoding.offset
    if transposed and scale.ndim == 2:
        scale, offset = scale.T, offset.T
    entry: dict[str, Any] = {
        "name": name,
        "dtype": "INT",
        "bw": scheme.bitwidth,
        "is_sym": scheme.symmetric,
    }
    match scheme.granularity:
        case PerTensor():
            entry["enc_type"] = "PER_TENSOR"
        case PerChannel():
            entry["enc_type"] = "PER_CHANNEL"
        case PerBlock(size) | Lpbq(size):
            entry |= {"enc_type": "PER_BLOCK", "block_size": size}
    entry["scale"] = scale.flatten().tolist()
    entry["offset"] = offset.flatten().tolist()
    return entry


def _integer(graph: QuantizedGraph, name: str) -> Encoding:
    encoding = graph.encodings[name]
    assert isinstance(encoding, Encoding)
    return encoding


def _quantizer_args(graph: QuantizedGraph) -> dict[str, Any]:
    """AIMET's summary of the whole model: its first activation and base weight grids."""
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
        "quant_scheme": "min_max",
    }
