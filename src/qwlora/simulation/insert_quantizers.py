"""Insert a quantizer after every value of a captured graph that gets one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from qwlora.errors import CalibrationError
from qwlora.graph.aten_ops import MAY_ALIAS, base_name, is_known
from qwlora.graph.graph_analysis import operator_of
from qwlora.graph.quantized_graph import GraphValue, Kind, insert_after
from qwlora.graph.value_traits import GridOptions
from qwlora.grid.min_max import measure
from qwlora.grid.range_estimator import as_estimator
from qwlora.grid.scheme import PerTensor, Scheme
from qwlora.parameter_names import is_factor_name
from qwlora.simulation.fake_quantizer import FrozenWeight, Quantizer
from qwlora.simulation.simulation_schemes import SimulationSchemes


def insert_quantizers(
    program: ExportedProgram,
    values: Iterable[GraphValue],
    schemes: SimulationSchemes,
    known: Mapping[str, FrozenWeight],
) -> tuple[GraphModule, dict[str, Quantizer], dict[str, FrozenWeight]]:
    """The program as a module with a quantizer after each of `values` but packed weights.

    Args:
        known: quantized copies of weights, by name; they are shared.

    Returns:
        the module, the quantizers of activations by name, and those of weights by name.

    Raises:
        CalibrationError: a weight is not finite.
    """
    module = program.module(check_guards=False)
    nodes = {node.name: node for node in module.graph.nodes}
    placeholders = _node_of_placeholder(program, module)
    activations, weights = dict[str, Quantizer](), dict[str, FrozenWeight]()
    frozen: dict[int, FrozenWeight] = {}  # by address: tied weights share one quantized copy
    for value in values:
        if value.kind is Kind.BASE:
            continue
        node, options = placeholders.get(value.node) or nodes[value.node], value.options
        quantizer: nn.Module
        if value.kind is Kind.ACTIVATION:
            quantizer = activations[value.name] = Quantizer(
                value.name,
                _with_options(schemes.activations, options),
                options.observer or as_estimator(schemes.observer),
                options.minimum,
                options.maximum,
                _is_fresh(node),
            )
        elif value.name in known:
            quantizer = weights[value.name] = known[value.name]
        else:
            scheme = schemes.adapter_weights if is_factor_name(value.name) else schemes.parameters
            weight = attribute_of(module, str(node.target)).detach()
            quantizer = weights[value.name] = _frozen_weight(
                value.name, weight, _with_options(scheme, options), frozen
            )
        target = f"quantizer_{value.node}"
        module.add_submodule(target, quantizer)
        insert_after(node, partial(_call_module, target=target))
    module.recompile()
    return module, activations, weights


def attribute_of(module: nn.Module, path: str) -> Tensor:
    """The tensor that a `get_attr` node reads."""
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), name)
    return tensor


def _call_module(node: Node, target: str) -> Node:
    return node.graph.call_module(target, (node,))


def _frozen_weight(
    name: str, weight: Tensor, scheme: Scheme, frozen: dict[int, FrozenWeight]
) -> FrozenWeight:
    shared = frozen.get(weight.data_ptr())
    if shared is not None and shared.value.shape == weight.shape:
        return shared
    if weight.ndim < 2:
        scheme = Scheme(scheme.bitwidth, scheme.symmetric, PerTensor())
    try:
        encoding = measure(weight, scheme)
    except CalibrationError as error:
        raise CalibrationError(f"{name}: {error}") from error
    made = frozen[weight.data_ptr()] = FrozenWeight(weight, encoding)
    return made


def _with_options(scheme: Scheme, options: GridOptions) -> Scheme:
    bitwidth = scheme.bitwidth if options.bitwidth is None else options.bitwidth
    symmetric = scheme.symmetric if options.symmetric is None else options.symmetric
    return replace(scheme, bitwidth=bitwidth, symmetric=symmetric)


def _is_fresh(node: Node) -> bool:
    """Whether the value of `node` shares no storage, so that the quantizer may overwrite it."""
    operator = operator_of(node) if node.op == "call_function" else ""
    return is_known(operator) and base_name(operator) == operator and operator not in MAY_ALIAS


def _node_of_placeholder(program: ExportedProgram, module: GraphModule) -> dict[str, Node]:
    """By placeholder of the program, its node in `module`, where parameters are attributes."""
    by_target = {str(n.target): n for n in module.graph.nodes if n.op == "get_attr"}
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    targets = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.target is not None
    }
    nodes = {name: by_target[target] for name, target in targets.items() if target in by_target}
    return nodes | dict(zip(program.graph_signature.user_inputs, inputs, strict=True))
