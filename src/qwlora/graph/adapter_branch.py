"""Which values of a captured graph are an adapter's own, and which the base's.

An adapter's own is what is computed in the layer that holds its factors, outside the base layer under it:

    base's        base_layer(x), and all that lies between adapted layers
    adapter's     lora_A(x), lora_B(lora_A(x)), the multiplication by the scaling, the sum with base_layer(x); what DoRA computes; modules saved whole

The base's values depend on the adapters in the layers before them, but a graph without any adapter has them too.
"""

from __future__ import annotations

import re

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from qwlora.graph.graph_parameters import module_path
from qwlora.parameter_names import is_adapter_name

_FACTOR = re.compile(r"(.*?)\.lora_\w+(?:\.|$)")
_OWN = re.compile(r"(.*?)\.(?:lora_\w+|modules_to_save)(?:\.|$)")


def branch_nodes(program: ExportedProgram) -> set[str]:
    """Names of the nodes that compute an adapter's own values; none where no adapter is active."""
    return _nodes_beside(program, _OWN)


def factor_nodes(program: ExportedProgram) -> set[str]:
    """Those of `branch_nodes` that are not of a module saved whole, which has a structure of its own."""
    return _nodes_beside(program, _FACTOR)


def _nodes_beside(program: ExportedProgram, own_parameter: re.Pattern[str]) -> set[str]:
    """Names of the nodes that run in the layers, but for their base layers, that have such a parameter; its first group is the layer."""
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    targets = [
        str(s.target)
        for s in program.graph_signature.input_specs
        if s.kind is InputKind.PARAMETER and s.arg.name in used
    ]
    layers = {
        found[1]
        for target in targets
        if is_adapter_name(target) and (found := own_parameter.match(target))
    }
    own = set()
    for node in program.graph.nodes:
        path = module_path(node)
        factor = own_parameter.match(path)
        if node.op == "call_function" and (
            path in layers or (factor is not None and factor[1] in layers)
        ):
            own.add(node.name)
    return own
