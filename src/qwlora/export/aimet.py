"""AIMET encodings files, version 1.0.0.

Top level: `version`, `activation_encodings`, `param_encodings` (lists), `excluded_layers`, `quantizer_args`, `producer`. An entry:

    {name, dtype: "INT", bw, is_sym, enc_type: PER_TENSOR | PER_CHANNEL | PER_BLOCK, scale: [...], offset: [...][, block_size]}

Codes are unsigned there: `real = (q + offset) * scale`, so a symmetric grid has `offset = -2^(bw - 1)`, which is this project's convention too. Scales of a
block-wise weight are listed row by row of the layer's `weight [out, in / block]`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwlora.grid.encoding import Encoding
from qwlora.grid.graph import Kind, QuantizedGraph
from qwlora.grid.scheme import PerBlock, PerChannel, PerTensor

VERSION = "1.0.0"


def write_encodings(graph: QuantizedGraph, path: Path) -> None:
    """Write every encoding of `graph`, under the names that the ONNX file's tensors carry."""
    activations = [m.name for m in graph.marks if m.kind is Kind.ACTIVATION]
    parameters = [m.name for m in graph.marks if m.kind is not Kind.ACTIVATION]
    record = {
        "version": VERSION,
        "producer": {"package": "qwlora", "version": VERSION},
        "activation_encodings": _entries(activations, graph),
        "param_encodings": _entries(parameters, graph),
        "excluded_layers": [],
        "quantizer_args": _quantizer_args(graph),
    }
    path.write_text(json.dumps(record) + "\n")


def encoding_to_entry(name: str, encoding: Encoding) -> dict[str, Any]:
    """One entry of the file."""
    scheme = encoding.scheme
    entry: dict[str, Any] = {"name": name, "dtype": "INT", "bw": scheme.bitwidth, "is_sym": scheme.symmetric}
    match scheme.granularity:
        case PerTensor():
            entry["enc_type"] = "PER_TENSOR"
        case PerChannel():
            entry["enc_type"] = "PER_CHANNEL"
        case PerBlock(size):
            entry |= {"enc_type": "PER_BLOCK", "block_size": size}
    entry["scale"] = encoding.scale.flatten().tolist()
    entry["offset"] = encoding.offset.flatten().tolist()
    return entry


def _entries(names: Iterable[str], graph: QuantizedGraph) -> list[dict[str, Any]]:
    return [encoding_to_entry(name, graph.encodings[name]) for name in names]


def _quantizer_args(graph: QuantizedGraph) -> dict[str, Any]:
    """AIMET's summary of the whole model: its most common activation and base weight grids."""
    by_kind = {m.kind: graph.encodings[m.name].scheme for m in reversed(graph.marks)}
    activation = by_kind.get(Kind.ACTIVATION)
    weight = by_kind.get(Kind.BASE, by_kind.get(Kind.PARAMETER))
    return {
        "activation_bitwidth": activation.bitwidth if activation else 32,
        "dtype": "int",
        "is_symmetric": weight.symmetric if weight else True,
        "param_bitwidth": weight.bitwidth if weight else 32,
        "per_channel_quantization": weight is not None and not isinstance(weight.granularity, PerTensor),
        "quant_scheme": "min_max",
    }
