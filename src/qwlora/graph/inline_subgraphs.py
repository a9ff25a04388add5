"""Inline the nested graphs that torch.export creates for some context managers.

    with torch.enable_grad(): ...                     an operator with a nested graph
    with torch.autocast("cpu", enabled=False): ...    the same

Placement and exporters work on one flat graph. Inlining is valid where the context changes no
value: gradient modes, and autocast that is disabled. Enabled autocast and other operators with
nested graphs (data-dependent branches, loops) are refused.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from qwlora.errors import CaptureError
from qwlora.graph.nodes import module_of
from qwlora.system.parameter_names import canonical_name

_GRADIENT_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inlined_graph(program: ExportedProgram) -> Graph:
    """A copy of the program's graph without nested graphs; refuses those that cannot be inlined."""
    graph = copy.deepcopy(program.graph)
    _inline_(graph, program.graph_module)
    return graph


def _inline_(graph: Graph, owner: GraphModule) -> None:
    for node in list(graph.nodes):
        held = [a for a in node.all_input_nodes if a.op == "get_attr"]
        modules = (getattr(owner, str(attribute.target), None) for attribute in held)
        inner = next((module for module in modules if isinstance(module, GraphModule)), None)
        if node.op != "call_function" or inner is None:
            continue
        body = copy.deepcopy(inner.graph)
        _inline_(body, inner)
        if node.target is _GRADIENT_MODE:
            arguments = node.args[2:]
        elif node.target is _AUTOCAST and not node.args[2]:  # not enabled
            arguments = node.args[5:]
        else:
            raise CaptureError(_refusal(node))
        placeholders = [n for n in body.nodes if n.op == "placeholder"]
        values: dict[Node, Any] = dict(zip(placeholders, arguments, strict=True))
        with graph.inserting_before(node):
            results = graph.graph_copy(body, values)
        for user in list(node.users):  # a getitem for each result
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        graph.erase_node(node)
        for attribute in held:
            if not attribute.users:
                graph.erase_node(attribute)


def _refusal(node: Node) -> str:
    where = canonical_name(module_of(node)[0]) or "the model"
    if node.target is _AUTOCAST:
        device, dtype = node.args[0], node.args[1]
        return (
            f"{where} computes under torch.autocast({device!r}, {dtype}), which changes the dtype "
            "of operators without a trace in the graph. Remove autocast, or cast the model "
            "(model.to(dtype)), and capture again"
        )
    return (
        f"{where} runs {getattr(node.target, '__name__', node.target)}, an operator with a nested "
        "graph whose values could not be quantized. Write that part without it (torch.where "
        "instead of a branch, for example), and capture again"
    )
