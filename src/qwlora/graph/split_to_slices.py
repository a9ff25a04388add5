"""Write the parts of a split as slices, each of one tensor; a split has a list of tensors.

    q, k, v = split(x, 64, -1)    -->    q, k, v = x[..., :64], x[..., 64:128], x[..., 128:]

torch.onnx writes a split as a sequence of tensors, which accelerators do not have. Parts without
values are left out of a concatenation: a model may rotate all of its widths and append the rest.
Nodes keep their names, and with them their encodings.
"""

from __future__ import annotations

import copy
import operator

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from qwlora.graph.aten_ops import base_name
from qwlora.graph.graph_analysis import operator_of
from qwlora.graph.quantized_graph import with_graph

_SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unsafe_split", "tensor_split"})


def slice_parts(program: ExportedProgram) -> ExportedProgram:
    """`program` with a slice for every part of a split, and without empty parts."""
    graph = copy.deepcopy(program.graph)
    for node in list(graph.nodes):
        if node.target is operator.getitem and base_name(operator_of(node)) in _SPLITS:
            _slice_(node)
        elif node.op == "call_function" and base_name(operator_of(node)) == "cat":
            parts = [part for part in node.args[0] if part.meta["val"].numel()]
            node.args = (parts, *node.args[1:])
    graph.eliminate_dead_code()
    return with_graph(program, graph)


def _slice_(part: Node) -> None:
    split, index = part.args
    assert isinstance(split, Node)
    assert isinstance(index, int)
    source = split.args[0]
    assert isinstance(source, Node)
    whole, parts = source.meta["val"], split.meta["val"]
    # the axis along which the parts have other sizes than the whole, which add up to it
    axis = next(a for a in range(whole.ndim) if parts[0].shape[a] != whole.shape[a])
    start = sum(int(each.shape[axis]) for each in parts[:index])
    end = start + int(parts[index].shape[axis])
    part.target = torch.ops.aten.slice.Tensor
    part.args = (source, axis, start, end)
