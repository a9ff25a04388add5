"""Graphs that a neural processing unit takes whole, with a key-value cache or without:

    npu = npu_graph(simulation, CacheSizes(tokens=1, context=1024))
    npu.device     tokens, cos, sin, mask, cache -> logits, new keys and values; every value has an
                   encoding, every size is fixed
    npu.host       positions, mask -> cos, sin, float mask: runs on the CPU before each call

Inputs and outputs are called as in Qualcomm's public recipes (`_renamed`). The graphs of a
simulation that takes `inputs_embeds`, of the language model in a vision-language model, take them
instead of input_ids; the host has the table, and positions of one or three axes.

The device graph also quantizes cosines, sines and the mask, scores with the mask, and norm weights
1 + w, which are floats in the simulation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from qwlora.errors import CalibrationError, listed
from qwlora.graph.capture import MASK, PAST, POSITIONS, PRESENT
from qwlora.graph.graph_analysis import computed_from
from qwlora.graph.nodes import (
    MOVES_DATA,
    ancestors,
    calls,
    module_of,
    operation,
    operator_of,
    origin,
    place_of,
    stored_tensors,
)
from qwlora.graph.quantized_graph import GraphValue, Kind, QuantizedGraph, rebuilt
from qwlora.graph.rewrites import rewritten
from qwlora.grid.encoding import Encoding, encoding_from_range, measure
from qwlora.grid.scheme import Scheme
from qwlora.simulation.fake_quantizer import grid_ends
from qwlora.simulation.kv_cache_graph import (
    Batch,
    CacheSizes,
    cached_graph,
    capture_with_cache,
    encoding_before,
    in_graph_order,
)
from qwlora.simulation.simulation import Simulation
from qwlora.targets.npu.device_graph import (
    ALPHA,
    COS,
    SIN,
    lift_host_inputs,
    lift_scaling,
    run_host,
    scaling_of,
)

# A masked score is lower than every other one by this much: e^-20 of a probability, less than a
# 16-bit step. A grid cannot hold minus infinity.
MASKED_BELOW = 20.0
# Float scores have no range to add to it; Genie and ai-hub-models use the same number.
_FLOAT_FLOOR = -1000.0
_PLACES = 64  # in the context, where the range of host inputs is measured
_ACTIVATION_FUNCTION = r"(?i)GELU|SiLU|Swish|Activation"
_WEIGHT = Scheme(16)


@dataclass(frozen=True)
class NpuGraph:
    """A graph of fixed size for an NPU, and the graph of what its host computes; `floor` is
    negative."""

    cache: CacheSizes | None
    device: QuantizedGraph
    host: QuantizedGraph
    floor: float

    @property
    def sizes(self) -> CacheSizes:
        """The sizes; only a graph with a cache has them."""
        assert self.cache is not None
        return self.cache


def host_arguments(sizes: CacheSizes, past: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Mask [1, context] and positions [1, sizes.tokens] for `tokens` new ones after `past` ones."""
    # Valid tokens are contiguous, so that a sliding window counts correct distances: those in the
    # cache are its last places, new ones the first of theirs.
    mask = torch.zeros(1, sizes.context, dtype=torch.int64)
    mask[:, sizes.past - min(past, sizes.past) : sizes.past + tokens] = 1
    positions = torch.arange(past, past + sizes.tokens)[None]
    return mask, positions


def npu_graph(
    simulation: Simulation, sizes: CacheSizes | Batch, largest_scaling: float | None = None
) -> NpuGraph:
    """The graph of a calibrated simulation with its adapter active: of a causal language model, for
    new tokens and a context; of any model, for the shapes of a batch, without a cache.
    `largest_scaling` is alpha / rank of any adapter that it will run with; default: that of the
    simulation's."""
    graph = cached_graph(simulation, capture_with_cache(simulation, sizes))
    return npu_form(graph, sizes, mask_floor(graph), largest_scaling or 0.0)


def mask_floor(graph: QuantizedGraph) -> float:
    """The floor of the mask that a graph of `cached_graph` needs."""
    # the widest range of what a softmax reads, before the mask
    if graph.has_float_activations:
        return _FLOAT_FLOOR
    marks = {mark.node: mark.name for mark in graph.marks}
    softmaxes = [node for node in calls(graph.program) if operation(node) == "softmax"]
    ranges = [
        grid_ends(graph.encodings[marks[read.name]])
        for node in softmaxes
        for read in ancestors(node.all_input_nodes[0], lambda n: n.name not in marks)
        if read.name in marks
    ]
    return -(MASKED_BELOW + max((high - low for low, high in ranges), default=0.0))


def npu_form(
    graph: QuantizedGraph, sizes: CacheSizes | Batch, floor: float, largest_scaling: float | None
) -> NpuGraph:
    """`npu_graph` of a graph of `cached_graph`, with this floor of the mask. Without
    `largest_scaling`, alpha / rank stays a constant of the graph, and activations may be float."""
    cache = sizes if isinstance(sizes, CacheSizes) else None
    placeholders = graph.program.graph_signature.user_inputs
    known = {mark.node: mark for mark in graph.marks}
    deciding = [
        name
        for name, node in zip(graph.interface.inputs, placeholders, strict=True)
        if (name in (MASK, POSITIONS) if cache else node not in known)
    ]
    program, interface, host = lift_host_inputs(graph.program, graph.interface, floor, deciding)
    scaling = None if largest_scaling is None else scaling_of(program)
    if scaling is not None:
        program, interface = lift_scaling(program, interface)
    program = rewritten(program)
    nodes = {node.name for node in program.graph.nodes}
    marks = {mark.node: mark for mark in graph.marks if mark.node in nodes}
    encodings = {mark.name: graph.encodings[mark.name] for mark in marks.values()}
    # what the graph adds is as wide as its widest activation: operators take one width
    scheme = Scheme(max(graph.activation_bitwidths, default=16), symmetric=False)
    is_float = largest_scaling is None and graph.has_float_activations
    added: dict[str, Encoding] = {}
    if cache and not is_float:
        added = _host_encodings(host, cache, scheme)
    elif not is_float:
        added = _lifted_encodings(host, graph, floor, scheme)
    if scaling is not None:
        added[ALPHA] = _between(0.0, max(scaling, largest_scaling or 0.0), scheme)
    inputs = dict(zip(interface.inputs, program.graph_signature.user_inputs, strict=True))
    for name, encoding in added.items():
        marks[inputs[name]] = GraphValue(inputs[name], name, Kind.ACTIVATION)
        encodings[name] = encoding
    masks = {node for name, node in inputs.items() if name.startswith(MASK)}
    if not is_float:
        _add_masked_scores_(program, masks, marks, encodings, scheme)
        program = _fold_norm_weights_(program, marks, encodings)
        _refuse_float_values(program, marks)
    placed = in_graph_order(program, marks)
    device = QuantizedGraph(
        program,
        replace(
            interface,
            inputs=tuple(map(_renamed, interface.inputs)),
            outputs=tuple(map(_renamed, interface.outputs)),
            shapes={_renamed(name): shape for name, shape in interface.shapes.items()},
            cached=frozenset(map(_renamed, interface.cached)),
        ),
        tuple(replace(mark, name=_renamed(mark.name)) for mark in placed),
        {_renamed(name): encoding for name, encoding in encodings.items()},
        graph.observer,
    )
    return NpuGraph(cache, device, host, floor)


def _add_masked_scores_(
    program: ExportedProgram,
    masks: set[str],
    marks: dict[str, GraphValue],
    encodings: dict[str, Encoding],
    scheme: Scheme,
) -> None:
    """The range of scores plus mask, which the simulation leaves float."""
    for node in calls(program):
        if node.name in marks or operation(node) != "add":
            continue
        scores = [n for n in node.all_input_nodes if origin(n).name not in masks]
        mask = next((n for n in node.all_input_nodes if n not in scores), None)
        if mask is None:
            continue
        encoding, grid = (encoding_before(n, marks, encodings) for n in (scores[0], mask))
        if encoding is None:
            raise CalibrationError(
                f"the attention scores before {node.name} have no encoding. "
                "Simulate with policy npu, and without rules that keep them float"
            )
        assert grid is not None
        low, high = grid_ends(encoding)
        name = f"{marks[origin(scores[0]).name].name}.masked"
        marks[node.name] = GraphValue(node.name, name, Kind.ACTIVATION)
        encodings[name] = _between(low + grid_ends(grid)[0], high, scheme)


def _fold_norm_weights_(
    program: ExportedProgram, marks: dict[str, GraphValue], encodings: dict[str, Encoding]
) -> ExportedProgram:
    """The program in which every norm reads a stored weight, not one computed from it."""
    # on the grid first: the norm then has the values that the simulation computes 1 + w from
    state = dict(program.state_dict)
    targets = {spec.arg.name: str(spec.target) for spec in program.graph_signature.input_specs}
    for node in calls(program):
        if operation(node) != "rms_norm":
            continue
        weight: Any = node.args[2]
        source = weight
        while source.op != "placeholder":
            (source,) = source.all_input_nodes
        if source is weight:
            continue
        name, target = marks[source.name].name, targets[source.name]
        value = encodings[name].fake_quantize(state[target].detach())
        folded = _evaluated(weight, source, value)
        state[target] = nn.Parameter(folded, requires_grad=False)
        encodings[name] = measure(folded, _WEIGHT)
        node.update_arg(2, source)
    program.graph.eliminate_dead_code()
    return rebuilt(program, state_dict=state)


def _refuse_float_values(program: ExportedProgram, marks: dict[str, GraphValue]) -> None:
    constants = computed_from(program, stored_tensors(program))
    floats = [
        f"{place_of(node)} ({operator_of(node)})"
        for node in calls(program)
        if node.name not in marks
        and node.name not in constants
        and isinstance(value := node.meta.get("val"), Tensor)
        and value.is_floating_point()
        and operation(node) not in MOVES_DATA
        and not re.search(_ACTIVATION_FUNCTION, module_of(node)[1])
    ]
    if floats:
        raise CalibrationError(
            f"{len(floats)} values would stay float on an NPU, which computes those in half "
            f"precision: {listed(floats, 3)}. Simulate with policy npu, residual "
            "additions quantized (Schemes(quantize_residual_adds=True)), and no rule that keeps "
            "values float"
        )


def _host_encodings(host: QuantizedGraph, sizes: CacheSizes, scheme: Scheme) -> dict[str, Encoding]:
    # evenly spaced lengths of the past: a long context has too many to run the host for each
    ranges: dict[str, tuple[float, float]] = {}
    for past in sorted({round(sizes.past * i / _PLACES) for i in range(_PLACES + 1)}):
        for name, value in run_host(host, *host_arguments(sizes, past, sizes.tokens)).items():
            if value.is_floating_point():
                low, high = ranges.get(name, (0.0, 0.0))
                ranges[name] = min(low, float(value.min())), max(high, float(value.max()))
    for name in list(ranges):
        # The largest cosine is that of position 0: 1, times what the model multiplies both with.
        # Between the measured places, sine and cosine may reach it with either sign.
        if name.startswith(COS):
            high = ranges[name][1]
            ranges[name] = ranges[name.replace(COS, SIN)] = -high, high
    return {name: _between(low, high, scheme) for name, (low, high) in ranges.items()}


def _lifted_encodings(
    host: QuantizedGraph, graph: QuantizedGraph, floor: float, scheme: Scheme
) -> dict[str, Encoding]:
    """The same for a graph without a cache: the simulation's encodings, or the range of a mask."""
    added, marks = {}, {mark.node: mark for mark in graph.marks}
    (results,) = host.program.graph.output_node().args
    for name, node in zip(host.interface.outputs, results, strict=True):
        if not node.meta["val"].is_floating_point():
            continue
        encoding = encoding_before(node, marks, graph.encodings)
        if encoding is None and not name.startswith(MASK):
            raise CalibrationError(
                f"{place_of(node)} ({operator_of(node)}), which the host computes from {name}, has "
                f"no encoding. Add a placement rule: {{match: {place_of(node)}, force: true}}"
            )
        added[name] = encoding or _between(floor, 0.0, scheme)
    return added


def _between(low: float, high: float, scheme: Scheme) -> Encoding:
    return encoding_from_range(torch.tensor(low), torch.tensor(high), scheme)


def _evaluated(node: Node, source: Node, value: Tensor) -> Tensor:
    if node is source:
        return value
    arguments = map_arg(node.args, lambda inner: _evaluated(inner, source, value))
    result: Tensor = node.target(*arguments, **node.kwargs)  # type: ignore[operator]
    return result


def _renamed(name: str) -> str:
    """The name of a cached tensor in Qualcomm's recipes; other names stay."""
    kind, _, rest = name.partition(".")
    if kind not in (PAST, PRESENT):
        return name
    layer, part = rest.split(".")
    return f"past_{part}_{layer}_{'in' if kind == PAST else 'out'}"
