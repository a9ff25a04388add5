"""Rewrites of a graph for accelerators whose floats are half precision and that have no lists.

    fuse_norms      y = w * (x * rsqrt(mean(x^2) + eps))  -->  y = rms_norm(x, w, eps)
    slice_parts     q, k, v = split(x, 64, -1)            -->  q, k, v = x[..., :64], ...
    lift_scaling    base(x) + lora_B(lora_A(x)) * 2.0     -->  ... * lora_alpha, an input

A norm's inner values are floats (`placement_rules.py`), and x^2 overflows half precision from 256
on: on Qualcomm's HTP the inner operators of a norm of values in the thousands gave an SQNR of
-14 dB, the operator 76 dB (onnxruntime-qnn 2.7). torch.onnx writes a split as a sequence of
tensors, which accelerators do not have. The scaling of an adapter is alpha / rank; as an input, a
runtime can switch adapters and their strength.

Nodes keep their names, and with them their encodings.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from qwlora.errors import CaptureError
from qwlora.graph.aten_ops import base_name
from qwlora.graph.graph_analysis import factor_nodes
from qwlora.graph.host_graph import program_over
from qwlora.graph.nodes import operation, operator_of
from qwlora.graph.quantized_graph import Interface, with_graph

ALPHA = "lora_alpha"
_SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unsafe_split", "tensor_split"})


def fuse_norms(program: ExportedProgram) -> ExportedProgram:
    """`program` with an `rms_norm` for every root mean square norm that has a weight.

    The weight may be computed from constants, such as 1 + w.
    """
    graph = copy.deepcopy(program.graph)
    for node in list(graph.nodes):
        _fuse_(node)
    graph.eliminate_dead_code()
    return with_graph(program, graph)


def _fuse_(rsqrt: Node) -> None:
    """Replace the norm around `rsqrt`, if it is one."""
    match _arguments(rsqrt, "rsqrt"):
        case [Node() as added]:
            match _arguments(added, "add"):
                case [Node() as mean, float() as epsilon]:
                    match _arguments(mean, "mean"):
                        case [Node() as square, [-1], True]:
                            _fuse_norm_(rsqrt, _root(square), epsilon)


def _fuse_norm_(rsqrt: Node, x: Node | None, epsilon: float) -> None:
    scaled = _only_user(rsqrt)
    if x is None or scaled is None or set(_arguments(scaled, "mul")) != {x, rsqrt}:
        return
    y = _only_user(scaled)
    factors = [] if y is None else [f for f in _arguments(y, "mul") if f is not scaled]
    if y is None or len(factors) != 1 or not isinstance(weight := factors[0], Node):
        return
    if weight.meta["val"].ndim == 1:
        y.target = torch.ops.aten.rms_norm.default
        y.args = (x, [int(x.meta["val"].shape[-1])], weight, epsilon)


def _root(square: Node) -> Node | None:
    """x, if the node is x^2."""
    match _arguments(square, "pow") or _arguments(square, "mul"):
        case [Node() as x, 2]:
            return x if operation(square) == "pow" else None
        case [Node() as x, Node() as other] if x is other:
            return x
    return None


def _arguments(node: Node, name: str) -> list[Any]:
    """The arguments of a call of an operator; empty for other nodes."""
    return list(node.args) if operation(node) == name else []


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def slice_parts(program: ExportedProgram) -> ExportedProgram:
    """`program` with a slice for every part of a split.

    Parts without values are left out of a concatenation: a model may rotate all of its widths and
    append the rest.
    """
    graph = copy.deepcopy(program.graph)
    for node in list(graph.nodes):
        if node.target is operator.getitem and base_name(operator_of(node)) in _SPLITS:
            _slice_(node)
        elif operation(node) == "cat":
            parts = [part for part in node.args[0] if part.meta["val"].numel()]
            node.args = (parts, *node.args[1:])
    graph.eliminate_dead_code()
    return with_graph(program, graph)


def _slice_(part: Node) -> None:
    split: Any = part.args[0]
    index: Any = part.args[1]
    source = split.args[0]
    whole, parts = source.meta["val"], split.meta["val"]
    # the axis along which the parts have other sizes than the whole, which add up to it
    axis = next(a for a in range(whole.ndim) if parts[0].shape[a] != whole.shape[a])
    start = sum(int(tensor.shape[axis]) for tensor in parts[:index])
    part.target = torch.ops.aten.slice.Tensor
    part.args = (source, axis, start, start + int(parts[index].shape[axis]))


def lift_scaling(
    program: ExportedProgram, interface: Interface
) -> tuple[ExportedProgram, Interface, float | None]:
    """The program with the scaling as its last input, and its value; None without an adapter.

    Every adapted layer reads the same input.

    Raises:
        CaptureError: layers of the adapter have different scalings.
    """
    scaling = scaling_of(program)
    if scaling is None:
        return program, interface, None
    graph, branch = copy.deepcopy(program.graph), factor_nodes(program)
    scaled = [n for n in graph.nodes if n.name in branch and _scaling(n) is not None]
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        alpha = graph.placeholder(ALPHA)
    alpha.meta["val"] = scaled[0].meta["val"].new_zeros(1)
    for node in scaled:
        node.args = (node.args[0], alpha)
    inputs, shapes = (*interface.inputs, ALPHA), {**interface.shapes, ALPHA: (1,)}
    return program_over(program, graph), replace(interface, inputs=inputs, shapes=shapes), scaling


def scaling_of(program: ExportedProgram) -> float | None:
    """alpha / rank of the adapter in a graph; None if there is none.

    Raises:
        CaptureError: layers of the adapter have different scalings.
    """
    branch = factor_nodes(program)
    values = (_scaling(node) for node in program.graph.nodes if node.name in branch)
    scalings = sorted({value for value in values if value is not None})
    if len(scalings) > 1:
        raise CaptureError(
            f"layers of the adapter have {len(scalings)} different scalings ({scalings[0]:g} to "
            f"{scalings[-1]:g}), and a graph has one input for all. Train the adapter without "
            "rank_pattern and alpha_pattern"
        )
    return scalings[0] if scalings else None


def _scaling(node: Node) -> float | None:
    """The number that a node multiplies with, if it is one of an adapter's scalings."""
    factor = node.args[1] if operation(node) == "mul" else None
    return float(factor) if isinstance(factor, int | float) else None
