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

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwlora.errors import EncodingsFileError
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
    onnx, shape_inference = require("onnx", "onnx"), require("onnx.shape_inference", "onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        raise EncodingsFileError(str(path), [problem]) from error
    except Exception as error:  # protobuf's errors have no common base class
        problem = f"is not an ONNX model: {type(error).__name__}"
        raise EncodingsFileError(str(path), [problem]) from error
    if not model.HasField("graph"):
        raise EncodingsFileError(str(path), ["is not an ONNX model: it holds no graph"])
    kinds, graph = onnx.TensorProto, model.graph
    with suppress(Exception):  # onnx raises several private classes; the graph is usable without
        graph = shape_inference.infer_shapes(model).graph
    return _GraphReader(graph, {kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE}).tensors()


class _GraphReader:
    def __init__(self, graph: Any, float_types: set[int]):
        self.graph, self.float_types = graph, float_types
        self.stored = {tensor.name: tensor for tensor in graph.initializer} | {
            node.output[0]: attribute.t
            for node in graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        }
        self.declared = {
            value.name: value.type.tensor_type
            for value in (*graph.value_info, *graph.input, *graph.output)
        }
        self.readers: dict[str, list[tuple[Any, int]]] = {}
        for node in graph.node:
            for position, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, position))

    def tensors(self) -> dict[str, OnnxTensor]:
        computed_by = self._carriers()
        known = {}
        outputs = {output for node in self.graph.node for output in node.output if output}
        for name in sorted({value.name for value in self.graph.input} | outputs):
            known[name] = OnnxTensor(
                False,
                self._declared_shape(name),
                needs_encoding=name in computed_by,
                computed_by=computed_by.get(name),
                moved_to=self._moved_to(name),
            )
        shapes = {name: tuple(tensor.dims) for name, tensor in self.stored.items()}
        for node in self.graph.node:  # with Q/DQ nodes, the parameter is the dequantized tensor
            if node.op_type == "DequantizeLinear" and node.input[0] in self.stored:
                shapes[node.output[0]] = shapes[node.input[0]]
        for name, shape in shapes.items():
            axes = set(self._axes_of(name, len(shape)))
            channel, block = axes.pop() if len(axes) == 1 else (None, None)
            known[name] = OnnxTensor(True, shape, channel, block, name in computed_by)
        return known

    def _declared_shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self.declared or not self.declared[name].HasField("shape"):
            return None
        dims = self.declared[name].shape.dim
        is_fixed = all(d.HasField("dim_value") for d in dims)
        return tuple(d.dim_value for d in dims) if is_fixed else None

    def _is_float(self, name: str) -> bool:
        if name in self.stored:
            return self.stored[name].data_type in self.float_types
        kind = self.declared[name].elem_type if name in self.declared else 0
        return not kind or kind in self.float_types

    def _carriers(self) -> dict[str, str | None]:
        """Tensors that need an encoding, and the op that computes each (None: input or stored).

        A graph with QuantizeLinear nodes says itself what is quantized: the outputs of its
        DequantizeLinear nodes.
        """
        inputs = {value.name for value in self.graph.input}
        vectors = {name for name, t in self.stored.items() if math.prod(t.dims) > 1}
        carrying = {name for name in inputs | vectors if self._is_float(name)}
        needing: dict[str, str | None] = dict.fromkeys(carrying)
        for node in self.graph.node:
            carries = (
                node.op_type == "DequantizeLinear"
                or carrying.intersection(node.input)
                or any(a.HasField("g") or a.graphs for a in node.attribute)  # a subgraph
            )
            if node.op_type == "Constant" or not carries:
                continue
            outputs = [name for name in node.output if name and self._is_float(name)]
            carrying.update(outputs)
            if node.op_type not in _MOVES:
                needing.update(dict.fromkeys(outputs, node.op_type))
        quantized = {
            name
            for name, readers in self.readers.items()
            if all(node.op_type in _QUANTIZERS for node, _ in readers)
        }
        has_quantizers = any(node.op_type == "QuantizeLinear" for node in self.graph.node)
        return {
            name: op
            for name, op in needing.items()
            if name not in quantized
            and not ((moved := self._moved_to(name)) and quantized.issuperset(moved))
            and (not has_quantizers or op == "DequantizeLinear")
        }

    def _moved_to(self, name: str) -> tuple[str, ...]:
        """The results of the ops that read `name`, if all of them only move it."""
        readers = [node for node, _ in self.readers.get(name, [])]
        if any(node.op_type not in _MOVES for node in readers):
            return ()
        return tuple(output for node in readers for output in node.output)

    def _axes_of(self, name: str, rank: int) -> Iterator[tuple[int | None, int | None]]:
        """Channel and block axis of a parameter, from each op that reads it or its transpose."""
        for node, position in self.readers.get(name, []):
            if node.op_type != "Transpose":
                yield _axes(node, position, rank)
                continue
            permutations = [list(a.ints) for a in node.attribute if a.name == "perm"]
            order = permutations[0] if permutations else list(reversed(range(rank)))
            for reader, its_position in self.readers.get(node.output[0], []):
                channel, block = (
                    None if axis is None or axis >= len(order) else order[axis]
                    for axis in _axes(reader, its_position, rank)
                )
                yield channel, block


def _axes(node: Any, position: int, rank: int) -> tuple[int | None, int | None]:
    """Channel and block axis of a parameter of `rank` axes at this input of `node`."""
    if rank == 1:
        return 0, None
    attributes = {a.name: a.i for a in node.attribute}
    if node.op_type == "Gather" and position == 0 and rank == 2 and not attributes.get("axis"):
        return 0, 1
    if position != 1 or rank < 2:
        return None, None
    match node.op_type:
        case "Conv":
            return 0, 1
        case "ConvTranspose":
            return 1, 0
        case "Gemm":
            return (0, 1) if attributes.get("transB") else (1, 0)
        case "MatMul":
            return rank - 1, rank - 2
    return None, None
