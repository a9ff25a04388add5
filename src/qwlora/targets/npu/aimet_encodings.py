"""The AIMET encodings file of an exported ONNX model.

    QDQ model      version 1.0.0, block scales in the order of the tensor ([in / block, out] for the
                   weight of a MatMul), as in AIMET's own ONNX export
    float model    as aimet-onnx reads it: 1.0.0 or 2.0.0. In 1.0.0, block scales are in one list,
                   channel by channel, however the tensor is stored; the producer says so
                   (`block_order`)

Every encoding has the name of its ONNX tensor. If no activation of a float model has a grid, 1.0.0
says of each that it is a float of 16 bits; 2.0.0 has no words for that. A weight with float offsets
has no encoding in any AIMET file; its layer is listed in `excluded_layers`.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwlora.formats import aimet_encodings as files
from qwlora.formats.aimet_encodings.grids import entry_of
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.grid.scheme import PerTensor
from qwlora.targets.npu.float_onnx import FloatOnnx
from qwlora.targets.registry import AIMET_ENCODINGS

# AIMET's names of observers that it also has; others keep ours, with underscores.
_QUANT_SCHEMES = {
    "min-max": "min_max",
    "sqnr": "post_training_tf_enhanced",
    "percentile": "post_training_percentile",
}


def write_encodings(
    model: QuantizedGraph | FloatOnnx,
    path: Path,
    transposed: Collection[str] = (),
    file_version: str = "1.0.0",
) -> None:
    """Write every encoding of a model, activations first.

    Args:
        model: the graph of a QDQ model, or a float model.
        transposed: names of the weights that a QDQ model stores as [in, out].
        file_version: 1.0.0, or 2.0.0 of a float model.
    """
    if isinstance(model, FloatOnnx):
        graph, encodings, transposed = model.graph, model.encodings, model.transposed
        parameters = encodings.keys() & model.model.graph.initializers.keys()
        order: files.BlockOrder = "channel"
    else:
        graph, order = model, "tensor"
        encodings = {mark.name: graph.encodings[mark.name] for mark in graph.marks}
        parameters = {mark.name for mark in graph.marks if mark.kind is not Kind.ACTIVATION}
    excluded = [name for name, e in encodings.items() if AIMET_ENCODINGS.problem(e.scheme)]
    producer = {"package": "qwlora", "version": version("qwlora")}
    sections: dict[str, Any] = {
        "parameters": frozenset(parameters.difference(excluded)),
        "excluded_layers": tuple(name.removesuffix(".weight") for name in excluded),
        "quantizer_args": _quantizer_args(graph),
    }
    entries: list[files.Entry] = [
        entry_of(name, encodings[name], file_version, name in transposed, order)
        for name in sorted(encodings, key=parameters.__contains__)
        if name not in excluded
    ]
    if isinstance(model, FloatOnnx) and graph.has_float_activations and file_version < "2":
        entries += [files.FloatEncoding(name, 16) for name in model.float_tensors()]
    file = files.EncodingsFile(
        file_version,
        tuple(entries),
        producer=producer | ({"block_order": order} if order == "channel" else {}),
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
