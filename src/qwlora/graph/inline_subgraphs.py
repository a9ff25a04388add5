"""Inline the nested graphs that torch.export creates for some context managers.

    with torch.enable_grad(): ...                     an operator with a nested graph
    with torch.autocast("cpu", enabled=False): ...    the same

Placement and exporters work on one flat graph. Inlining is valid where the context changes no
value: gradient modes never do, and autocast does not if it is disabled or changes no result's
dtype. Other operators with nested graphs (data-dependent branches, loops) are refused.
"""

from __future__ import annotations

import copy
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from qwlora.errors import CaptureError
from qwlora.graph.graph_analysis import module_of
from qwlora.parameter_names import canonical_name

_GRADIENT_MODE, _AUTOCAST = (
    torch.ops.higher_order.wrap_with_set_grad_enabled,
    torch.ops.higher_order.wrap_with_autocast,
)


def inlined_graph(program: ExportedProgram) -> Graph:
    """A copy of the program's graph without nested graphs.

    Raises:
        CaptureError: a nested graph cannot be inlined. The message names its module.
    """
    graph = copy.deepcopy(program.graph)
    _inline_(graph, program.graph_module)
    return graph


def _inline_(graph: Graph, owner: GraphModule) -> None:
    for node in list(graph.nodes):
        inner = _inner_graph(node, owner)
        if inner is None:
            continue
        body = copy.deepcopy(inner.graph)
        _inline_(body, inner)
        if node.target is _GRADIENT_MODE:
            arguments = node.args[2:]
        elif node.target is _AUTOCAST and not (node.args[2] and _changes_types(body)):
            arguments = node.args[5:]
        else:
            raise CaptureError(_refusal(node))
        values: dict[Node, Any] = dict(
            zip((n for n in body.nodes if n.op == "placeholder"), arguments, strict=True)
        )
        with graph.inserting_before(node):
            results = graph.graph_copy(body, values)
        for user in list(node.users):  # a getitem for each result
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        wrapped = [
            argument
            for argument in node.args
            if isinstance(argument, Node) and argument.op == "get_attr"
        ]
        graph.erase_node(node)
        for attribute in wrapped:
            if not attribute.users:
                graph.erase_node(attribute)


def _inner_graph(node: Node, owner: GraphModule) -> GraphModule | None:
    """The nested graph of an operator, if it has one."""
    if node.op != "call_function":
        return None
    held = (getattr(owner, str(a.target), None) for a in node.all_input_nodes if a.op == "get_attr")
    return next((module for module in held if isinstance(module, GraphModule)), None)


def _changes_types(graph: Graph) -> bool:
    """Whether autocast gave a result a dtype that its arguments and options do not explain."""
    for node in graph.nodes:
        result = node.meta.get("val")
        if (
            node.op != "call_function"
            or not isinstance(result, Tensor)
            or not result.is_floating_point()
        ):
            continue
        options = [*node.args, *node.kwargs.values()]
        types: list[torch.dtype] = []
        map_arg(  # calls the function at once
            options,
            lambda n: types.append(n.meta["val"].dtype) if _is_float(n) else None,  # noqa: B023
        )
        if (
            types
            and result.dtype not in options
            and result.dtype != reduce(torch.promote_types, types)
        ):
            return True
    return False


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


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
