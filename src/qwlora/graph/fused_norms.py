"""Write root mean square norms as one operator, for accelerators whose floats are half precision.

    y = w * (x * rsqrt(mean(x^2) + eps))    -->    y = rms_norm(x, w, eps)

A norm's inner values are floats (`placement_rules.py`), and x^2 overflows half precision from 256
on: on Qualcomm's HTP the inner operators of a norm of values in the thousands gave an SQNR of
-14 dB, the operator 76 dB (onnxruntime-qnn 2.7). The node of y keeps its name, and with it its
encoding.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from qwlora.graph.aten_ops import base_name
from qwlora.graph.graph_analysis import operator_of
from qwlora.graph.quantized_graph import with_graph


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
                    _fuse_mean_(rsqrt, mean, epsilon)


def _fuse_mean_(rsqrt: Node, mean: Node, epsilon: float) -> None:
    match _arguments(mean, "mean"):
        case [Node() as square, [-1], True]:
            x = _root(square)
        case _:
            return
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
    match _arguments(square, "pow"):
        case [Node() as x, 2]:
            return x
    match _arguments(square, "mul"):
        case [Node() as x, Node() as other] if x is other:
            return x
    return None


def _arguments(node: Node, operator: str) -> list[Any]:
    """The arguments of a call of an operator; empty for other nodes."""
    if node.op != "call_function" or base_name(operator_of(node)) != operator:
        return []
    return list(node.args)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
