"""A simulation as one ONNX model for the base and all of its adapters.

What depends on the adapter is an input with a default, so that a session without an adapter
computes the base:

    FACTOR.codes, .scale, .zero_point    integers and grid of lora_A and lora_B; of rank 0
    FACTOR                               the same where factors are float (policy weights-only)
    VALUE.scale, VALUE.zero_point        grid of an activation; that of the base
    LAYER.scaling                        alpha / rank

The model is that of a zero adapter on every layer that any adapter changes. The file of an adapter
(`write_adapter_file`) has its values of these inputs. A layer that it does not change keeps rank 0,
and the sum reuses the grid of the base layer's output, so the extra rounding is a no-op.

The model has a key-value cache: without past tokens it computes the full sequence, as the
simulation does. If the model has none that can be inputs, the graph of full sequences is written.

    input_ids, attention_mask, position_ids, past_key_values.N.key, .value, ...
        -> logits, present.N.key, .value, ...

Numbers have shape [1], and codes of 4 bits or fewer are stored in 8, as adapter files need it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.fx import Node

from qwlora.errors import CaptureError, ExportError, listed
from qwlora.export.onnx.onnx_model import (
    DATA_FILE,
    MODEL_FILE,
    activation_arrays,
    add_input,
    build_model,
    weight_arrays,
    write_adapter_file,
)
from qwlora.export.onnx.onnx_runtime import load_graph
from qwlora.export.proof.contents import ADAPTER_FILE
from qwlora.export.proof.reference import Reference
from qwlora.graph.aten_ops import base_name
from qwlora.graph.graph_analysis import branch_nodes
from qwlora.graph.nodes import operator_of, parameter_names
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.grid.scheme import Blocks, PerChannel
from qwlora.simulation.kv_cache_graph import cached_graph, capture_with_cache
from qwlora.simulation.simulation import Simulation
from qwlora.system.optional_packages import require
from qwlora.system.parameter_names import canonical_name, is_adapter_name, is_factor_name

_GRID = (".scale", ".zero_point")
_SCALING = ".scaling"
_TRANSPOSED = "qwlora.transposed"  # of the model's metadata: weights that are stored [in, out]
_REMEDY = (
    "If another adapter changes this layer, give all adapters the same target_modules and layers, "
    "or use target onnx_each, which writes a model for each adapter; else calibrate on more data"
)


def _storable(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`array` in a form that adapter files can have."""
    name = array.dtype.name
    if name in ("int4", "uint4"):
        array = array.astype(name.replace("4", "8"))
    return array.reshape(array.shape or (1,))


def graph_with_cache(simulation: Simulation) -> tuple[QuantizedGraph, str | None]:
    """The simulation's graph with a key-value cache, and None; or the graph without one, and why
    the model has none."""
    try:
        captured = capture_with_cache(simulation)
        return cached_graph(simulation, captured, quantize_past=False), None
    except CaptureError as error:
        return simulation.graph(), str(error)


def write_switchable(
    graph: QuantizedGraph, folder: Path, metadata: Mapping[str, str], base_activations: bool
) -> set[str]:
    """Write the model of a zero adapter.

    Args:
        base_activations: the grids of activations that the base computes depend on the adapter.

    Returns:
        names of the weights that are stored [in, out].

    Raises:
        ExportError: see `build_model`; or the adapter is not one of LoRA factors alone.
    """
    _refuse_others(graph)
    model, transposed = build_model(graph, metadata)
    known = {_input_name(name): value for name, value in model.graph.initializers.items()}
    branch, fixed = branch_nodes(graph.program), set[str]()
    for mark in graph.marks:
        if mark.kind is Kind.ACTIVATION and mark.node not in branch and not base_activations:
            fixed |= {f"{mark.name}{part}" for part in _GRID}
    values = _values(graph, transposed)
    for name in values:
        if name.endswith(_SCALING):
            layer = name.removesuffix(_SCALING)
            factors = (f"{layer}.lora_B.weight", f"{layer}.lora_embedding_B")
            stored = next(n for f in factors for n in (f"{f}.codes", f) if n in known)
            known[name] = _scaling(known[stored])
    for name, array in values.items():
        value = known.get(name)
        if value is None or name in fixed:
            continue
        shape = list[int | str](array.shape)
        if (rank := _rank(name, graph, transposed)) is not None:
            axis, shape[rank[0]] = rank
            array = np.take(array, [], axis)
        add_input(model, name, array, shape, value)
    model.metadata_props[_TRANSPOSED] = json.dumps(sorted(transposed))
    require("onnx_ir", "onnx").save(model, folder / MODEL_FILE, external_data=DATA_FILE)
    return transposed


def _input_name(initializer: str) -> str:
    """What an initializer is called as an input."""
    if initializer.endswith((".codes", *_GRID)):
        return initializer
    return canonical_name(initializer.removeprefix("model."))


def write_adapter(graph: QuantizedGraph, base: Path, folder: Path) -> set[str]:
    """Write what the simulation of an adapter has for the inputs of the model in `base`.

    Returns:
        names of the weights that are stored [in, out].

    Raises:
        ExportError: the model has no place for one of the values, or has another base.
    """
    model = load_graph(base / MODEL_FILE)
    shared, transposed = model.graph, set(json.loads(model.metadata_props[_TRANSPOSED]))
    _refuse_others(graph)
    values = _values(graph, transposed)
    defaults = {value.name for value in shared.inputs if value.const_value is not None}
    fixed = {name: shared.initializers.get(name) for name in values.keys() - defaults}
    if unknown := sorted({name.rpartition(".")[0] for name in fixed if fixed[name] is None}):
        raise ExportError(
            f"the adapter's simulation quantizes {listed(unknown, 3)}, the exported base does not. "
            f"{_REMEDY}"
        )
    for name, value in fixed.items():
        assert value is not None
        if not np.array_equal(value.const_value.numpy().reshape(-1), values[name].reshape(-1)):
            raise ExportError(f"{name} of the adapter is not that of the base; export both again")
    for node in shared:
        if node.op_type == "QuantizeLinear" and node.inputs[1].name in defaults - values.keys():
            values |= _unchanged(node, values)
    own = {name: array for name, array in values.items() if name in defaults}
    write_adapter_file(own, folder / ADAPTER_FILE)
    return transposed


def _values(graph: QuantizedGraph, transposed: Collection[str]) -> dict[str, np.ndarray[Any, Any]]:
    """What `graph` has for the inputs of the base's model, and for its fixed grids, by name.

    It is read from the graph: a translation to ONNX takes longer than everything else of an
    adapter's export.
    """
    program, marked = graph.program, {mark.node for mark in graph.marks}
    nodes = {node.name: node for node in program.graph.nodes}
    weights = {
        spec.arg.name: program.state_dict[spec.target].detach()
        for spec in program.graph_signature.input_specs
        if spec.target in program.state_dict
    }
    found = dict[str, np.ndarray[Any, Any]]()
    for mark in graph.marks:
        encoding, arrays = graph.encodings[mark.name], dict[str, np.ndarray[Any, Any]]()
        if mark.kind is Kind.ACTIVATION:
            arrays = activation_arrays(mark.name, encoding)
        elif mark.kind is Kind.ADAPTER:
            codes = encoding.quantize(weights[mark.node])
            arrays = weight_arrays(codes, encoding, mark.name in transposed)
        found |= {f"{mark.name}{part}": _storable(array) for part, array in arrays.items()}
    for placeholder, name in parameter_names(program).items():
        node, path = nodes[placeholder], canonical_name(name)
        if not (node.users and is_factor_name(path)):
            continue
        if placeholder not in marked:
            found[path] = weights[placeholder].cpu().numpy()
        if not _is_first(path):
            while not (_is_product(node) and isinstance(node.args[1], int | float)):
                (node,) = node.users
            found[f"{path.partition('.lora_')[0]}{_SCALING}"] = np.array([node.args[1]], np.float32)
    return found


def _is_product(node: Node) -> bool:
    return node.op == "call_function" and base_name(operator_of(node)) == "mul"


def _unchanged(
    node: Any, values: Mapping[str, np.ndarray[Any, Any]]
) -> dict[str, np.ndarray[Any, Any]]:
    """Grid of a value that the model quantizes in `node` and the adapter does not have; see the
    module.

    Raises:
        ExportError: the value is not one of an adapter's.
    """
    name, source = node.inputs[1].name.removesuffix(".scale"), node.inputs[0].producer()
    read = [] if source is None else [value.name for value in source.inputs if value is not None]
    if ".lora_" in name or any(value.endswith(_SCALING) for value in read):
        return {}  # zero, on any grid
    for value in read:
        if source.op_type == "Add" and f"{value}.scale" in values:
            return {f"{name}{part}": values[f"{value}{part}"] for part in _GRID}
    raise ExportError(
        f"the exported base quantizes {name}, the adapter's simulation does not. {_REMEDY}"
    )


def _refuse_others(graph: QuantizedGraph) -> None:
    names = map(canonical_name, graph.program.state_dict)
    if others := [n for n in names if is_adapter_name(n) and not is_factor_name(n)]:
        raise ExportError(
            f"the adapter has {listed(others, 3)}: only LoRA factors can be switched. Train "
            "without them, or use target onnx_each, which writes a model for each adapter"
        )


def _scaling(factor: Any) -> Any:
    """A value in place of the constant that the output of lora_B is multiplied with.

    Args:
        factor: the initializer of lora_B.
    """
    (node,) = factor.consumers()
    while node.op_type != "Mul":
        (node,) = node.outputs[0].consumers()
    value = require("onnx_ir", "onnx").val("scaling")
    node.replace_input_with(1, value)
    return value


def _is_first(factor: str) -> bool:
    """Whether a factor reads the layer's input: [rank, in], the other is [out, rank]."""
    return factor.removesuffix(".weight").endswith("_A")


def _rank(name: str, graph: QuantizedGraph, transposed: Collection[str]) -> tuple[int, str] | None:
    """Axis of an input that has the adapter's rank, and the axis's name; None if none has."""
    layer, is_factor, _ = name.partition(".lora_")
    factor, _, part = name.rpartition(".")
    if is_factor_name(name):  # a float one
        factor, part = name, "weight"
    if not (is_factor and is_factor_name(factor)):
        return None
    axis, rank = 0 if _is_first(factor) else 1, f"rank:{layer}"
    place = 1 - axis if factor in transposed else axis
    if part in ("codes", "weight"):
        return place, rank
    match graph.encodings[factor].scheme.granularity:
        case PerChannel(channel):
            return (0, rank) if channel == axis else None
        case Blocks():  # blocks of [out, rank] are along the rank
            return place, rank if axis == 0 else f"blocks:{rank}"
    return None


class ZeroAdapter:
    """The simulation of a zero adapter, to compare the model with when no adapter is active.

    Values inside the branch are left out, but not the sum with the layer's own output: they have
    the simulation's rank, and rank 0 in the model.
    """

    def __init__(self, simulation: Reference):
        self.outputs = simulation.outputs
        self.perturbed_outputs = simulation.perturbed_outputs
        self.values = simulation.values
        self.bind = simulation.bind
        self._graph = simulation.graph

    def graph(self) -> QuantizedGraph:
        graph = self._graph()
        nodes = {node.name: node for node in graph.program.graph.nodes}
        inside = {
            name
            for name in branch_nodes(graph.program)
            if base_name(operator_of(nodes[name])) != "add"
        }
        marks = tuple(mark for mark in graph.marks if mark.node not in inside)
        return replace(graph, marks=marks)
