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
    axes: dict[str, set[tuple[int | None, int | None]]] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in stored:
                axes.setdefault(name, set()).add(_axes(node, position, len(stored[name].dims)))
    there = {value.name for value in graph.input} | {output for node in graph.node for output in node.output if output}
    known = {name: TensorFacts(False) for name in sorted(there)}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.name not in there:  # exporters leave value_info of tensors that they removed
            continue
        tensor = value.type.tensor_type
        dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
        shape = dims if tensor.HasField("shape") and -1 not in dims else None
        known[value.name] = TensorFacts(False, shape, floating=tensor.elem_type in float_types or not tensor.elem_type)
    for name, tensor in stored.items():
        found = axes.get(name, set())
        channel, block = found.pop() if len(found) == 1 else (None, None)
        known[name] = TensorFacts(True, tuple(tensor.dims), channel, block, tensor.data_type in float_types)
    return known


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
