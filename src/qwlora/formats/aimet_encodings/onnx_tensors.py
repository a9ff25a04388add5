"""What an ONNX graph says about its tensors and an encodings file may not.

Axes of a parameter follow from the op that reads it, directly or through a Transpose:

    op                 weight                    channel axis   block axis
    Conv               [out, in / groups, ...]        0              1
    ConvTranspose      [in, out / groups, ...]        1              0
    Gemm, transB = 1   [out, in]                      0              1
    Gemm, MatMul       [in, out]                     last         last - 1
    Gather, axis 0     [rows, width], an embedding    0              1
    1-D                a bias, a norm                 0            none

A quantizing runtime needs encodings for tensors that carry the model's float values. It needs none
for:

    integers, booleans                          shapes, indices, positions
    computed from integers and single numbers   masks, zeros, ranges
    one stored number                           an epsilon, an exponent, a divisor
    moved, not computed                         Reshape, Transpose, Slice, Concat, Cast ...
    read only by Q/DQ nodes                     codes, scales, zero points, values being quantized

Types and shapes are inferred by onnx; a tensor whose type stays unknown counts as float.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwlora.errors import EncodingsFileError, described
from qwlora.system.optional_packages import require

_MOVES = {
    *("Cast", "CastLike", "Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze"),
    *("Transpose", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Slice", "Split", "Gather"),
    *("GatherElements", "GatherND", "Compress", "Concat", "Pad", "Where", "ScatterElements"),
    *("ScatterND", "ReverseSequence"),
}
_QUANTIZERS = {"QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class OnnxTensor:
    """One tensor of a graph.

    Args:
        parameter: stored in the model; otherwise an activation.
        shape: None if the graph leaves it open.
        channel_axis, block_axis: of a parameter; None if no op implies them or two ops disagree.
        needs_encoding: carries float values that a quantizing runtime rounds.
        computed_by: op type, for an activation that needs an encoding; None for an input.
        moved_to: where an activation is only reshaped, cast and so on: the results. Encodings of
            all of them are an encoding of this one.
    """

    parameter: bool
    shape: tuple[int, ...] | None = None
    channel_axis: int | None = None
    block_axis: int | None = None
    needs_encoding: bool = True
    computed_by: str | None = None
    moved_to: tuple[str, ...] = ()


Graph = Mapping[str, OnnxTensor]


def read_graph(path: Path | str) -> dict[str, OnnxTensor]:
    """Every tensor in an ONNX file's main graph, by name; external data is not read.

    Raises:
        MissingExtraError: onnx is not installed.
        EncodingsFileError: the file is not an ONNX model.
    """
    onnx, ir = require("onnx", "onnx"), require("onnx_ir", "onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.HasField("graph"):
            raise ValueError("it has no graph")
        with suppress(Exception):  # onnx raises several private classes; the types are optional
            model = onnx.shape_inference.infer_shapes(model)
        graph = ir.from_proto(model).graph
    except Exception as error:  # protobuf's errors have no common base class
        problem = f"is not an ONNX model that can be read ({described(error)})"
        raise EncodingsFileError(str(path), [problem]) from error
    outputs = [value for node in graph for value in node.outputs if value.name]
    computed_by = _carriers(graph, outputs)
    tensors = {}
    for value in (*graph.inputs, *graph.initializers.values(), *outputs):
        node, stored = value.producer(), _stored(value)
        if node is not None and node.op_type == "DequantizeLinear":
            stored = _stored(node.inputs[0])  # with Q/DQ nodes, this is the parameter
        shape = value.shape if stored is None else stored.shape
        sizes = tuple(shape.numpy()) if shape is not None and shape.is_static() else None
        needs_encoding = value in computed_by
        if stored is None:
            op, moved_to = computed_by.get(value), tuple(moved.name for moved in _moved_to(value))
            tensors[value.name] = OnnxTensor(False, sizes, None, None, needs_encoding, op, moved_to)
        else:
            axes = set(_axes_of(value, len(stored.shape)))
            channel, block = axes.pop() if len(axes) == 1 else (None, None)
            tensors[value.name] = OnnxTensor(True, sizes, channel, block, needs_encoding)
    return tensors


def _stored(value: Any) -> Any:
    """The tensor that the file stores for a value, or None."""
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor()
    return value.const_value


def _is_float(value: Any) -> bool:
    dtype = value.dtype if _stored(value) is None else _stored(value).dtype
    return dtype is None or dtype.name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")


def _carriers(graph: Any, outputs: Sequence[Any]) -> dict[Any, str | None]:
    """Values that need an encoding, and the op that computes each (None: input or stored).

    A graph with QuantizeLinear nodes says itself what is quantized: the outputs of its
    DequantizeLinear nodes.
    """
    given = (*graph.inputs, *graph.initializers.values(), *outputs)
    carrying = {
        value
        for value in given
        if _is_float(value)
        and (value.is_graph_input() or ((t := _stored(value)) is not None and t.size > 1))
    }
    needing: dict[Any, str | None] = dict.fromkeys(carrying)
    for node in graph:
        carries = (
            node.op_type == "DequantizeLinear"
            or carrying.intersection(node.inputs)
            or any(a.type.name in ("GRAPH", "GRAPHS") for a in node.attributes.values())
        )
        if node.op_type == "Constant" or not carries:
            continue
        results = [value for value in node.outputs if value.name and _is_float(value)]
        carrying.update(results)
        if node.op_type not in _MOVES:
            needing.update(dict.fromkeys(results, node.op_type))
    quantized = {
        value
        for value in given
        if value.uses() and all(use.node.op_type in _QUANTIZERS for use in value.uses())
    }
    has_quantizers = any(node.op_type == "QuantizeLinear" for node in graph)
    return {
        value: op
        for value, op in needing.items()
        if value not in quantized
        and not ((moved := _moved_to(value)) and quantized.issuperset(moved))
        and (not has_quantizers or op == "DequantizeLinear")
    }


def _moved_to(value: Any) -> list[Any]:
    """The results of the ops that read `value`, if all of them only move it."""
    readers = [use.node for use in value.uses()]
    if any(node.op_type not in _MOVES for node in readers):
        return []
    return [output for node in readers for output in node.outputs]


def _axes_of(value: Any, rank: int) -> Iterator[tuple[int | None, int | None]]:
    """Channel and block axis of a parameter, from each op that reads it or its transpose."""
    for node, position in value.uses():
        if node.op_type != "Transpose":
            yield _axes(node, position, rank)
            continue
        order = node.attributes.get_ints("perm", list(reversed(range(rank))))
        for use in node.outputs[0].uses():
            channel, block = (
                None if axis is None or axis >= len(order) else order[axis]
                for axis in _axes(use.node, use.idx, rank)
            )
            yield channel, block


def _axes(node: Any, position: int, rank: int) -> tuple[int | None, int | None]:
    """Channel and block axis of a parameter of `rank` axes at this input of `node`."""
    if rank == 1:
        return 0, None
    if node.op_type == "Gather" and position == 0 and rank == 2:
        return (None, None) if node.attributes.get_int("axis", 0) else (0, 1)
    if position != 1 or rank < 2:
        return None, None
    match node.op_type:
        case "Conv":
            return 0, 1
        case "ConvTranspose":
            return 1, 0
        case "Gemm":
            return (0, 1) if node.attributes.get_int("transB", 0) else (1, 0)
        case "MatMul":
            return rank - 1, rank - 2
    return None, None
