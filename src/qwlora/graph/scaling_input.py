"""Make an input of an adapter's scaling, so that a runtime can switch adapters and their strength.

    y = base(x) + lora_B(lora_A(x)) * 2.0    -->    y = base(x) + lora_B(lora_A(x)) * lora_alpha

The scaling of an adapter is alpha / rank. Every adapted layer reads the same input.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from torch.export import ExportedProgram
from torch.fx import Node

from qwlora.errors import CaptureError
from qwlora.graph.adapter_branch import factor_nodes
from qwlora.graph.aten_ops import base_name
from qwlora.graph.graph_analysis import operator_of
from qwlora.graph.host_graph import program_over
from qwlora.graph.quantized_graph import Interface

ALPHA = "lora_alpha"


def lift_scaling(
    program: ExportedProgram, interface: Interface
) -> tuple[ExportedProgram, Interface, float | None]:
    """The program with the scaling as its last input, and its value; None without an adapter.

    Raises:
        CaptureError: layers of the adapter have different scalings.
    """
    scaling = scaling_of(program)
    if scaling is None:
        return program, interface, None
    graph = copy.deepcopy(program.graph)
    own = factor_nodes(program)
    scaled = [n for n in graph.nodes if n.name in own and _scaling(n) is not None]
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        alpha = graph.placeholder(ALPHA)
    alpha.meta["val"] = scaled[0].meta["val"].new_zeros(1)
    for node in scaled:
        node.args = (node.args[0], alpha)
    named = replace(
        interface,
        inputs=(*interface.inputs, ALPHA),
        shapes={**interface.shapes, ALPHA: (1,)},
    )
    return program_over(program, graph), named, scaling


def scaling_of(program: ExportedProgram) -> float | None:
    """alpha / rank of the adapter in a graph; None if there is none.

    Raises:
        CaptureError: layers of the adapter have different scalings.
    """
    own = factor_nodes(program)
    values = (_scaling(node) for node in program.graph.nodes if node.name in own)
    found = sorted({value for value in values if value is not None})
    if len(found) > 1:
        raise CaptureError(
            f"layers of the adapter have {len(found)} different scalings ({found[0]:g} to "
            f"{found[-1]:g}), and a graph has one input for all. Train the adapter without "
            "rank_pattern and alpha_pattern"
        )
    return found[0] if found else None


def _scaling(node: Node) -> float | None:
    """The number that a node multiplies with, if it is one of an adapter's scalings."""
    if node.op != "call_function" or base_name(operator_of(node)) != "mul":
        return None
    factor = node.args[1]
    return float(factor) if isinstance(factor, int | float) else None
