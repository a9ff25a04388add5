"""The graph with a key-value cache that computes what a simulation computes.

    simulation = simulate(model, {"input_ids": ids, "attention_mask": mask})     # calibrated
    graph = cached_graph(simulation, capture_with_cache(simulation))
    export_onnx(graph, folder)

Weights are the simulation's. Encodings carry over by name. Past keys and values, and what they
become with the new ones after them, have the encoding of the new ones:

    past_key_values.0.key    on the grid of the new keys, which were outputs in an earlier call
    cat(past, new)           the same

So the graph prefills and decodes on the grids of the full sequence, and one set of encodings holds
for all graphs of the model. Without past tokens it computes the full sequence, bit for bit.

Values that an earlier call returned are on that grid already. A runtime that keeps them as floats
does not have to quantize them again: `quantize_past` false leaves both without an encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

from torch.export import ExportedProgram
from torch.fx import Node

from qwlora.adapter.active_adapters import activate_
from qwlora.errors import CaptureError, listed
from qwlora.graph.capture import Captured
from qwlora.graph.kv_cache_capture import CacheSizes, cache_additions, capture_cached
from qwlora.graph.nodes import moved_from, used_placeholders
from qwlora.graph.quantized_graph import GraphValue, Kind, QuantizedGraph, rebuilt
from qwlora.grid.encoding import Encoding
from qwlora.grid.range_estimator import as_estimator
from qwlora.simulation.adapter_simulations import restored_adapters
from qwlora.simulation.placement import place
from qwlora.simulation.simulation import Simulation
from qwlora.system.parameter_names import adapter_of, canonical_name


def capture_with_cache(
    simulation: Simulation,
    sizes: CacheSizes | None = None,
    present: Literal["all", "new"] = "all",
) -> Captured:
    """`capture_cached` of the simulation's model, with the simulation's adapter active."""
    model = simulation.origin.model
    adapters = {adapter_of(name) for name in _used(simulation.program)} - {None}
    with restored_adapters(model) if adapters else nullcontext():
        if adapters:
            activate_(model, [str(name) for name in adapters])
        return capture_cached(model, sizes, present)


def cached_graph(
    simulation: Simulation, captured: Captured, quantize_past: bool = True
) -> QuantizedGraph:
    """The graph of `captured` (by `capture_cached`, of the simulation's model with an adapter of
    this structure active) on the grids and with the weights of a calibrated simulation. Values of
    the simulation that the graph lacks or has in another shape are refused."""
    encodings = simulation.encodings
    program = _with_weights(captured.program, simulation.program)
    placement = place(program, simulation.origin.schemes, captured.input_names)
    nodes = {value.name: value.node for value in placement.values}
    if missing := [name for name in encodings if name not in nodes]:
        raise CaptureError(
            f"{len(missing)} of {len(encodings)} encodings have no value in the graph with a "
            f"cache: {listed(missing, 3)}. The model computes something else with a cache than "
            "without, so its encodings do not carry over"
        )
    marks = {nodes[m.name]: replace(m, node=nodes[m.name]) for m in simulation.marks}
    names = {node: name for name, node in nodes.items()}
    for added in cache_additions(captured).values() if quantize_past else ():
        encoding = encoding_before(added.new, marks, encodings)
        for node in (added.past, added.whole):
            if encoding is not None:
                marks[node.name] = GraphValue(node.name, names[node.name], Kind.ACTIVATION)
                encodings[names[node.name]] = encoding
    placed = in_graph_order(program, marks)
    return QuantizedGraph(
        program,
        captured.interface,
        placed,
        {mark.name: encodings[mark.name] for mark in placed},
        as_estimator(simulation.origin.schemes.observer).name,
    )


def in_graph_order(
    program: ExportedProgram, marks: Mapping[str, GraphValue]
) -> tuple[GraphValue, ...]:
    """`marks` by node, in the order of the nodes."""
    return tuple(marks[node.name] for node in program.graph.nodes if node.name in marks)


def encoding_before(
    node: Node, marks: Mapping[str, GraphValue], known: Mapping[str, Encoding]
) -> Encoding | None:
    """The encoding of a value that data movement may have moved since it got it."""
    source: Node | None = node
    while source is not None and source.name not in marks:
        source = moved_from(source)
    return None if source is None else known[marks[source.name].name]


def _with_weights(program: ExportedProgram, source: ExportedProgram) -> ExportedProgram:
    """`program` over the tensors of `source`."""
    tensors = {canonical_name(name): source.state_dict[name] for name in _used(source)}
    state = dict(program.state_dict)
    for name in _used(program):
        tensor, shape = tensors.get(canonical_name(name)), state[name].shape
        if tensor is None or tensor.shape != shape:
            raise CaptureError(
                f"{name} is {list(shape)} in the graph with a cache and "
                f"{'missing' if tensor is None else list(tensor.shape)} in the simulation. Capture "
                "the graph with an adapter of the same structure active"
            )
        state[name] = tensor
    return rebuilt(program, state_dict=state)


def _used(program: ExportedProgram) -> list[str]:
    """Names of the parameters and buffers that the graph reads, without those of idle adapters."""
    placeholders = used_placeholders(program)
    return [
        str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.target in program.state_dict and spec.arg.name in placeholders
    ]
