"""Which values of a captured graph belong to an adapter, and which to the base.

    adapter     everything an adapted layer computes outside its base layer: lora_A(x),
                lora_B(lora_A(x)), the scaling, the sum with base_layer(x), DoRA; `modules_to_save`
    base        base_layer(x), and everything between adapted layers

A graph without adapter has exactly the base's values, although with an adapter their numbers depend
on the adapted layers before them.
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
    """Names of the nodes that compute values of the active adapter."""
    return _adapter_nodes(program, _OWN)


def unaffected_nodes(program: ExportedProgram) -> set[str]:
    """Names of the nodes whose values are the same with every adapter: no adapter's parameter is
    among the values that they depend on."""
    adapters = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.PARAMETER and is_adapter_name(str(spec.target))
    }
    affected = set[str]()
    for node in program.graph.nodes:
        if node.name in adapters or any(i.name in affected for i in node.all_input_nodes):
            affected.add(node.name)
    return {node.name for node in program.graph.nodes} - affected


def factor_nodes(program: ExportedProgram) -> set[str]:
    """`branch_nodes` without those of `modules_to_save`."""
    return _adapter_nodes(program, _FACTOR)


def _adapter_nodes(program: ExportedProgram, own_parameter: re.Pattern[str]) -> set[str]:
    """Names of the nodes of adapted layers, without their base layers.

    Args:
        own_parameter: matches an adapter's parameters; its first group is the adapted layer.
    """
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
