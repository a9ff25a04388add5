"""What a model's graph knows and an encodings file may not: which tensors are parameters, their shapes, and their axes, which the op implies.

op                 weight                    channel axis   block axis
Conv               [out, in / groups, ...]        0              1
ConvTranspose      [in, out / groups, ...]        1              0
Gemm, transB = 1   [out, in]                      0              1
Gemm, MatMul       [in, out]                     last         last - 1
Gather, axis 0     [rows, width], an embedding    0              1
1-D                a bias, a norm                 0            none

A transpose between them is seen through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwlora.encodings.onnx_dataflow import moved_only, wanting
from qwlora.errors import EncodingsFileError, MissingExtraError


@dataclass(frozen=True)
class TensorFacts:
    """What the graph says about one tensor.

    Args:
        parameter: whether it is stored in the model; else it is an activation.
        shape: None where the graph leaves it open.
        channel_axis, block_axis: implied by the op that reads a parameter; None where it implies none, or two ops differ.
        wanted: whether a quantizing runtime wants an encoding for it; see `dataflow.py`.
        computed_by: the op that computes a wanted activation; None for what is stored or given.
        moved_to: what an activation is moved to (reshaped, cast ...), where nothing else reads it.
    """

    parameter: bool
    shape: tuple[int, ...] | None = None
    channel_axis: int | None = None
    block_axis: int | None = None
    wanted: bool = True
    computed_by: str | None = None
    moved_to: tuple[str, ...] = ()


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
        raise MissingExtraError(
            "reading an ONNX model needs the package onnx: pip install 'qwlora[onnx]'"
        ) from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise EncodingsFileError(
            str(path), [f"cannot be read: {error.strerror or error}"]
        ) from error
    except Exception as error:  # protobuf's errors share no class with each other
        raise EncodingsFileError(
            str(path), [f"is not an ONNX model: {type(error).__name__}"]
        ) from error
    if not model.HasField("graph"):
        raise EncodingsFileError(str(path), ["is not an ONNX model: it holds no graph"])
    return _facts(
        model.graph,
        {
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.FLOAT16,
            onnx.TensorProto.BFLOAT16,
            onnx.TensorProto.DOUBLE,
        },
    )


def _facts(graph: Any, float_types: set[int]) -> dict[str, TensorFacts]:
    constants = {
        node.output[0]: a.t
        for node in graph.node
        if node.op_type == "Constant"
        for a in node.attribute
        if a.name == "value"
    }
    stored = {t.name: t for t in graph.initializer} | constants
    shapes = {name: tuple(t.dims) for name, t in stored.items()}
    # in a file with QDQ nodes, the parameter is what DequantizeLinear makes of stored integers
    shapes |= {
        node.output[0]: shapes[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }
    wanted, computed_by = wanting(graph, stored, lambda kind: kind in float_types)
    moved = moved_only(graph)
    known = {
        name: TensorFacts(
            False,
            shape,
            wanted=name in wanted,
            computed_by=computed_by.get(name),
            moved_to=moved.get(name, ()),
        )
        for name, shape in _activations(graph).items()
    }
    readers: dict[str, list[tuple[Any, int]]] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, position))
    for name, shape in shapes.items():
        found = set(_axes_of(name, len(shape), readers))
        channel, block = found.pop() if len(found) == 1 else (None, None)
        known[name] = TensorFacts(True, shape, channel, block, name in wanted)
    return known


def _activations(graph: Any) -> dict[str, tuple[int, ...] | None]:
    """The shapes of what the graph is given and what its nodes make, as far as they are known."""
    there = {value.name for value in graph.input} | {
        output for node in graph.node for output in node.output if output
    }
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(sorted(there))
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.name in there and value.type.tensor_type.HasField(
            "shape"
        ):  # exporters leave value_info of tensors that they removed
            dims = tuple(
                d.dim_value if d.HasField("dim_value") else -1
                for d in value.type.tensor_type.shape.dim
            )
            shapes[value.name] = None if -1 in dims else dims
    return shapes


def _axes_of(
    name: str, rank: int, readers: Mapping[str, list[tuple[Any, int]]]
) -> Iterator[tuple[int | None, int | None]]:
    """Channel and block axis of a parameter of `rank` axes, from each op that reads it or its transpose (a tied head reads the embedding's)."""
    for node, position in readers.get(name, []):
        if node.op_type != "Transpose":
            yield _axes(node, position, rank)
            continue
        order = next(
            (list(a.ints) for a in node.attribute if a.name == "perm"), list(reversed(range(rank)))
        )
        for reader, its_position in readers.get(node.output[0], []):
            yield tuple(
                None if axis is None or axis >= len(order) else order[axis]
                for axis in _axes(reader, its_position, rank)
            )  # type: ignore[misc]


def _axes(node: Any, position: int, rank: int) -> tuple[int | None, int | None]:
    """Channel and block axis of a parameter of `rank` axes at this input of `node`."""
    if rank == 1:
        return 0, None
    if (
        node.op_type == "Gather"
        and position == 0
        and rank == 2
        and not any(a.name == "axis" and a.i for a in node.attribute)
    ):
        return 0, 1
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
