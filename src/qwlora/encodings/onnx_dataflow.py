"""Which tensors of an ONNX graph a quantizing runtime wants an encoding for: those that carry the model's float values and that an op computes.

Not wanted, and why:

    integers, booleans                          shapes, indices, positions
    computed from integers and single numbers   masks, zeros, ranges
    one stored number                           an epsilon, an exponent, a divisor
    moved, not computed                         Reshape, Transpose, Slice, Concat, Cast ...: they share the grid of what they move
    read, or moved and read, by quantizers only values on their way to a grid, codes, scales and zero points of a file with QDQ nodes

Types that the file leaves open follow from the ops; where they do not, a tensor counts as float.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

_RESHAPES = frozenset(
    [
        "Cast",
        "CastLike",
        "Identity",
        "Dropout",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Expand",
        "Tile",
        "DepthToSpace",
        "SpaceToDepth",
    ]
)
_PICKS = frozenset(
    [
        "Slice",
        "Split",
        "Gather",
        "GatherElements",
        "GatherND",
        "Compress",
        "Concat",
        "Pad",
        "Where",
        "ScatterElements",
        "ScatterND",
        "ReverseSequence",
    ]
)
MOVES = _RESHAPES | _PICKS
_QUANTIZERS = {"QuantizeLinear", "DequantizeLinear"}
_INTEGERS = frozenset("Shape Size NonZero ArgMax ArgMin QuantizeLinear NonMaxSuppression".split())  # noqa: SIM905
_BOOLEANS = frozenset(
    [
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "And",
        "Or",
        "Not",
        "Xor",
        "IsNaN",
        "IsInf",
    ]
)
_FLOATS = frozenset({"DequantizeLinear"})


def wanting(
    graph: Any, stored: Mapping[str, Any], is_float: Callable[[int], bool]
) -> tuple[set[str], dict[str, str]]:
    """(names that want an encoding, the op that computes each of them; stored tensors and inputs have none).

    Args:
        graph: an ONNX GraphProto.
        stored: the tensors that it holds, under their names.
        is_float: whether an ONNX element type is a float; 0 is unknown.
    """
    floating = _floating(graph, stored, is_float)
    inside = _inside_quantizers(graph)
    carrying = {v.name for v in graph.input if floating[v.name]} | {
        name for name, t in stored.items() if floating[name] and _size(t.dims) > 1
    }
    wanted = carrying - inside
    computed_by: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Constant" or not (
            node.op_type == "DequantizeLinear"
            or carrying.intersection(node.input)
            or _has_subgraph(node)
        ):
            continue
        for name in filter(None, node.output):
            if floating[name]:
                carrying.add(name)
                if name not in inside and node.op_type not in MOVES:
                    wanted.add(name)
                    computed_by[name] = node.op_type
    moved_inside = {
        name for name, outputs in moved_only(graph).items() if inside.issuperset(outputs)
    }
    return wanted - moved_inside, computed_by


def moved_only(graph: Any) -> dict[str, tuple[str, ...]]:
    """For each tensor that is moved and not read otherwise, what it is moved to; an encoding there is its encoding."""
    moved: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            moved.setdefault(name, []).extend(node.output if node.op_type in MOVES else [""])
    return {name: tuple(outputs) for name, outputs in moved.items() if all(outputs)}


def _floating(
    graph: Any, stored: Mapping[str, Any], is_float: Callable[[int], bool]
) -> dict[str, bool]:
    """Whether each tensor holds floats: as the file says, else as its op implies."""
    said = {
        v.name: v.type.tensor_type.elem_type
        for v in (*graph.value_info, *graph.input, *graph.output)
    }
    known = {name: is_float(kind) for name, kind in said.items() if kind} | {
        name: is_float(t.data_type) for name, t in stored.items()
    }
    floating = {v.name: known.get(v.name, True) for v in graph.input} | {
        name: known[name] for name in stored
    }
    for node in graph.node:
        implied = _implied(node, floating, is_float)
        floating |= {name: known.get(name, implied) for name in node.output if name}
    return floating


def _implied(node: Any, floating: Mapping[str, bool], is_float: Callable[[int], bool]) -> bool:
    if node.op_type in _INTEGERS | _BOOLEANS:
        return False
    if node.op_type in _FLOATS:
        return True
    attributes = {a.name: a for a in node.attribute}
    if "value_int" in attributes or "value_ints" in attributes:
        return False
    if node.op_type == "Cast" and "to" in attributes:
        return is_float(attributes["to"].i)
    if node.op_type == "ConstantOfShape":
        return "value" not in attributes or is_float(attributes["value"].t.data_type)
    position = 1 if node.op_type in ("CastLike", "Where") else 0
    return floating.get(node.input[position], True) if len(node.input) > position else True


def _inside_quantizers(graph: Any) -> set[str]:
    """Tensors that only QuantizeLinear and DequantizeLinear read: values on their way to a grid, codes, and the grid's own numbers."""
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    return {name for name, kinds in readers.items() if kinds <= _QUANTIZERS}


def _has_subgraph(node: Any) -> bool:
    return any(a.HasField("g") or a.graphs for a in node.attribute)


def _size(dims: Collection[int]) -> int:
    size = 1
    for dim in dims:
        size *= dim
    return size
