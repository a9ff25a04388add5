"""What a model's graph knows and an encodings file may not: which tensors are parameters, their shapes, and their axes, which the op implies.

op                 weight                    channel axis   block axis
Conv               [out, in / groups, ...]        0              1
ConvTranspose      [in, out / groups, ...]        1              0
Gemm, transB = 1   [out, in]                      0              1
Gemm, MatMul       [in, out]                     last         last - 1
1-D                a bias, a norm                 0            none
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwlora.errors import EncodingsFileError, MissingExtraError


@dataclass(frozen=True)
class TensorFacts:
    """What the graph says about one tensor.

    Args:
        parameter: whether it is stored in the model; else it is an activation.
        shape: None where the graph leaves it open.
        channel_axis, block_axis: implied by the op that reads a parameter; None where it implies none, or two ops differ.
        floating: whether its values are floats (or unknown), so that it may have an encoding.
    """

    parameter: bool
    shape: tuple[int, ...] | None = None
    channel_axis: int | None = None
    block_axis: int | None = None
    floating: bool = True


Graph = Mapping[str, TensorFacts]


def read_graph(path: Path | str) -> dict[str, TensorFacts]:
    """Facts about every tensor in an ONNX file's main graph; external data is not read.

    Raises:
        MissingExtraError: onnx is not installed.
        EncodingsFileError: the file is not an ONNX model.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("reading an ONNX model needs the package onnx: pip install 'qwlora[onnx]'") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise EncodingsFileError(str(path), [f"cannot be read: {error.strerror or error}"]) from error
    except Exception as error:  # protobuf's errors share no class with each other
        raise EncodingsFileError(str(path), [f"is not an ONNX model: {type(error).__name__}"]) from error
    if not model.HasField("graph"):
        raise EncodingsFileError(str(path), ["is not an ONNX model: it holds no graph"])
    return _facts(model.graph, {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE})


def _facts(graph: Any, float_types: set[int]) -> dict[str, TensorFacts]:
    constants = {node.output[0]: a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"}
    stored = {t.name: t for t in graph.initializer} | constants
    shapes = {name: tuple(t.dims) for name, t in stored.items()}
    # in a file with QDQ nodes, the parameter is what DequantizeLinear makes of stored integers
    shapes |= {node.output[0]: shapes[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored}
    inside = _inside_quantizers(graph)
    known = _activations(graph, float_types, inside)
    axes: dict[str, set[tuple[int | None, int | None]]] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in shapes:
                axes.setdefault(name, set()).add(_axes(node, position, len(shapes[name])))
    for name, shape in shapes.items():
        found = axes.get(name, set())
        channel, block = found.pop() if len(found) == 1 else (None, None)
        floating = name not in inside and (name not in stored or stored[name].data_type in float_types)
        known[name] = TensorFacts(True, shape, channel, block, floating)
    return known


def _activations(graph: Any, float_types: set[int], inside: set[str]) -> dict[str, TensorFacts]:
    """Facts about what the graph is given and what its nodes make."""
    there = {value.name for value in graph.input} | {output for node in graph.node for output in node.output if output}
    known = {name: TensorFacts(False, floating=name not in inside) for name in sorted(there)}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.name not in there:  # exporters leave value_info of tensors that they removed
            continue
        tensor = value.type.tensor_type
        dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
        shape = dims if tensor.HasField("shape") and -1 not in dims else None
        floating = value.name not in inside and (tensor.elem_type in float_types or not tensor.elem_type)
        known[value.name] = TensorFacts(False, shape, floating=floating)
    return known


def _inside_quantizers(graph: Any) -> set[str]:
    """Tensors that only QuantizeLinear and DequantizeLinear read: values on their way to a grid, codes, and the grid's own numbers."""
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    return {name for name, kinds in readers.items() if kinds <= {"QuantizeLinear", "DequantizeLinear"}}


def _axes(node: Any, position: int, rank: int) -> tuple[int | None, int | None]:
    """Channel and block axis of a parameter of `rank` axes at this input of `node`."""
    if rank == 1:
        return 0, None
    if position != 1 or rank < 2:
        return None, None
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    match node.op_type:
        case "Conv":
            return 0, 1
        case "ConvTranspose":
            return 1, 0
        case "Gemm":
            return (0, 1) if transposed else (1, 0)
        case "MatMul":
            return rank - 1, rank - 2
    return None, None
