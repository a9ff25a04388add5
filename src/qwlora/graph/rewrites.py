"""Rewrites of a captured graph into fewer operators. Nodes keep their names, and with them their
encodings.

    y = w * (x * rsqrt(mean(x^2) + eps))  -->  y = rms_norm(x, w, eps)
    q, k, v = split(x, 64, -1)            -->  q, k, v = x[..., :64], ...
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from qwlora.errors import CaptureError
from qwlora.graph.nodes import base_name, operation, operator_of, place_of
from qwlora.graph.quantized_graph import with_graph

_SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unsafe_split", "tensor_split"})


def rewritten(program: ExportedProgram) -> ExportedProgram:
    """`program` with an `rms_norm` for every root mean square norm with a weight, which may be
    computed from constants (1 + w), and with a slice for every part of a split."""
    graph = copy.deepcopy(program.graph)
    for node in list(graph.nodes):
        _fuse_(node)
        try:
            # torch.onnx writes a split as a sequence of tensors, which accelerators do not have
            if node.target is operator.getitem and base_name(operator_of(node)) in _SPLITS:
                _slice_(node)
            elif operation(node) == "cat":
                # a model that rotates its whole width may still append an empty rest
                parts = [part for part in node.args[0] if part.meta["val"].numel()]
                node.args = (parts, *node.args[1:])
        except GuardOnDataDependentSymNode as error:
            raise CaptureError(
                f"{place_of(node)} has tensors whose shape depends on data. The model cannot be "
                "rotated (set base.rotation: null), nor exported with a key-value cache"
            ) from error
    graph.eliminate_dead_code()
    return with_graph(program, graph)


def _fuse_(rsqrt: Node) -> None:
    # x^2 overflows half precision from 256 on: on Qualcomm's HTP the inner operators of a norm of
    # values in the thousands gave an SQNR of -14 dB, the operator 76 dB (onnxruntime-qnn 2.7).
    match _nested(rsqrt, depth=4):
        case "rsqrt", [
            "add",
            ["mean", [name, Node() as x, factor], [-1], True],
            float() as epsilon,
        ]:
            scaled, other = _product(rsqrt)
            y, weight = _product(scaled)
            is_norm = other is x and (name, factor) in (("pow", 2), ("mul", x))
            if is_norm and y is not None and weight is not None and weight.meta["val"].ndim == 1:
                y.target = torch.ops.aten.rms_norm.default
                y.args = (x, [int(x.meta["val"].shape[-1])], weight, epsilon)


def _nested(node: Any, depth: int) -> Any:
    if not depth or not isinstance(node, Node):
        return node
    return [operation(node), *(_nested(argument, depth - 1) for argument in node.args)]


def _product(factor: Node | None) -> tuple[Node | None, Node | None]:
    """The product that alone reads `factor`, and its other factor."""
    users = list(factor.users) if factor is not None else []
    if len(users) == 1 and operation(users[0]) == "mul":
        others = [other for other in users[0].args if other is not factor]
        if len(others) == 1 and isinstance(others[0], Node):
            return users[0], others[0]
    return None, None


def _slice_(part: Node) -> None:
    split: Any = part.args[0]
    index: Any = part.args[1]
    source = split.args[0]
    whole, parts = source.meta["val"], split.meta["val"]
    # The parts differ from the whole along the axis of the split. A single part is the whole, so
    # any axis will do.
    axis = next((a for a in range(whole.ndim) if parts[0].shape[a] != whole.shape[a]), 0)
    start = sum(int(tensor.shape[axis]) for tensor in parts[:index])
    part.target = torch.ops.aten.slice.Tensor
    part.args = (source, axis, start, start + int(parts[index].shape[axis]))
