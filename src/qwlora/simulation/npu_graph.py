"""A simulation as graphs that a neural processing unit takes whole.

    npu = npu_graph(simulation, CacheSizes(tokens=1, context=1024))
    npu.device     tokens, cos, sin, mask, cache -> logits, new keys and values; every value has an
                   encoding, every size is fixed
    npu.host       positions, mask -> cos, sin, float mask: runs on the CPU before each call

Inputs and outputs are called as in Qualcomm's public recipes:

    input_ids, attention_mask, position_ids_cos, position_ids_sin, past_key_0_in, past_value_0_in
    logits, past_key_0_out, past_value_0_out      of the new tokens only, and so on for each layer

Keys are [1, heads, tokens, width], like values. past_key_0_in and past_key_0_out have one encoding.

The simulation computes three values in float; the device graph quantizes them:

    cos, sin, mask      their range over all positions of the context
    scores + mask       the range of the scores, lowered by the mask
    norm weights 1 + w  their own range

A masked score is `floor` lower instead of minus infinity. The floor is chosen so that a masked
score stays `MASKED_BELOW` below every other one: e^-20 of a probability, less than a 16-bit step.
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
from qwlora.graph.aten_ops import MOVES_DATA
from qwlora.graph.capture import MASK, PAST, PRESENT
from qwlora.graph.device_graph import (
    ALPHA,
    COS,
    SIN,
    lift_host_inputs,
    lift_scaling,
    rewritten,
    run_host,
)
from qwlora.graph.graph_analysis import computed_from
from qwlora.graph.kv_cache_capture import CacheSizes
from qwlora.graph.nodes import calls, module_of, operation, operator_of, origin, stored_tensors
from qwlora.graph.quantized_graph import GraphValue, Kind, QuantizedGraph, rebuilt
from qwlora.grid.encoding import Encoding
from qwlora.grid.min_max import encoding_from_range, measure
from qwlora.grid.scheme import Scheme
from qwlora.simulation.fake_quantizer import grid_ends
from qwlora.simulation.kv_cache_graph import (
    cached_graph,
    capture_with_cache,
    encoding_before,
    in_graph_order,
)
from qwlora.simulation.simulation import Simulation

MASKED_BELOW = 20.0
_PLACES = 64  # in the context, where the range of host inputs is measured
_ACTIVATION_FUNCTION = r"(?i)GELU|SiLU|Swish|Activation"
_SIXTEEN_BITS = Scheme(16, symmetric=False)
_WEIGHT = Scheme(16)


@dataclass(frozen=True)
class NpuGraph:
    """A graph of fixed size for an NPU, and the graph of what its host computes. The floor of the
    mask is negative; `scaling` is alpha / rank of the simulation's adapter, the value of input
    `lora_alpha`, and None without such an input."""

    sizes: CacheSizes
    device: QuantizedGraph
    host: QuantizedGraph
    floor: float
    scaling: float | None


def host_arguments(sizes: CacheSizes, past: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Mask [1, context] and positions [1, sizes.tokens] for `tokens` new ones after `past` ones.

    Valid tokens are contiguous: those in the cache on its right, new ones on the left of theirs.
    """
    mask = torch.zeros(1, sizes.context, dtype=torch.int64)
    mask[:, sizes.past - min(past, sizes.past) : sizes.past + tokens] = 1
    positions = torch.arange(past, past + sizes.tokens)[None]
    return mask, positions


def npu_graph(
    simulation: Simulation, sizes: CacheSizes, largest_scaling: float | None = None
) -> NpuGraph:
    """The graph of a calibrated simulation, of a causal language model with its adapter active, for
    a number of new tokens and a context. `largest_scaling` is alpha / rank of any adapter that it
    will run with; default: that of the simulation's. Values that would stay float are refused."""
    graph = cached_graph(simulation, capture_with_cache(simulation, sizes, "new"))
    return npu_form(graph, sizes, mask_floor(graph), largest_scaling or 0.0)


def mask_floor(graph: QuantizedGraph) -> float:
    """The floor of the mask that a graph of `cached_graph` needs, from the widest range of what a
    softmax reads, before the mask; see the module."""
    marks = {mark.node: mark.name for mark in graph.marks}
    widest = 0.0
    for node in graph.program.graph.nodes:
        waiting = node.all_input_nodes[:1] if operation(node) == "softmax" else []
        while waiting:
            read = waiting.pop()
            if read.name in marks:
                low, high = grid_ends(graph.encodings[marks[read.name]])
                widest = max(widest, high - low)
            else:
                waiting += read.all_input_nodes
    return -(MASKED_BELOW + widest)


def npu_form(
    graph: QuantizedGraph, sizes: CacheSizes, floor: float, largest_scaling: float | None
) -> NpuGraph:
    """`npu_graph` of a graph of `cached_graph`, with this floor of the mask. Without
    `largest_scaling`, alpha / rank stays a constant of the graph."""
    program, interface, host = lift_host_inputs(graph.program, graph.interface, floor)
    scaling = None
    if largest_scaling is not None:
        program, interface, scaling = lift_scaling(program, interface)
    program = rewritten(program)
    nodes = {node.name for node in program.graph.nodes}
    marks = {mark.node: mark for mark in graph.marks if mark.node in nodes}
    encodings = {mark.name: graph.encodings[mark.name] for mark in marks.values()}
    added = _host_encodings(host, sizes)
    if scaling is not None:
        added[ALPHA] = _between(0.0, max(scaling, largest_scaling or 0.0))
    inputs = dict(zip(interface.inputs, program.graph_signature.user_inputs, strict=True))
    for name, encoding in added.items():
        marks[inputs[name]] = GraphValue(inputs[name], name, Kind.ACTIVATION)
        encodings[name] = encoding
    masks = {node for name, node in inputs.items() if name.startswith(MASK)}
    _add_masked_scores_(program, masks, marks, encodings)
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
    return NpuGraph(sizes, device, host, floor, scaling)


def _add_masked_scores_(
    program: ExportedProgram,
    masks: set[str],
    marks: dict[str, GraphValue],
    encodings: dict[str, Encoding],
) -> None:
    """The range of scores plus mask, which the simulation leaves float."""
    for node in calls(program):
        if node.name in marks or operation(node) != "add":
            continue
        scores = [n for n in node.all_input_nodes if origin(n).name not in masks]
        mask = next((n for n in node.all_input_nodes if n not in scores), None)
        if mask is None:
            continue
        encoding = encoding_before(scores[0], marks, encodings)
        if encoding is None:
            raise CalibrationError(
                f"the attention scores before {node.name} have no encoding. "
                "Set simulation.policy: npu, and remove rules that keep them float"
            )
        grid = encoding_before(mask, marks, encodings)
        assert grid is not None
        low, high = grid_ends(encoding)
        name = f"{marks[origin(scores[0]).name].name}.masked"
        marks[node.name] = GraphValue(node.name, name, Kind.ACTIVATION)
        encodings[name] = _between(low + grid_ends(grid)[0], high)


def _fold_norm_weights_(
    program: ExportedProgram, marks: dict[str, GraphValue], encodings: dict[str, Encoding]
) -> ExportedProgram:
    """The program in which every norm reads a stored weight, not one computed from it."""
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
    """Refuse values that would be computed in half precision."""
    constants = computed_from(program, stored_tensors(program))
    floats = [
        f"{module_of(node)[0].removeprefix('model.') or 'the model'} ({operator_of(node)})"
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
            f"precision: {listed(floats, 3)}. Set simulation.policy: npu and "
            "simulation.residual_adds: quantize, and remove rules with keep: float"
        )


def _host_encodings(host: QuantizedGraph, sizes: CacheSizes) -> dict[str, Encoding]:
    """The encoding of each float input that the host computes."""
    last = sizes.context - sizes.tokens
    ranges: dict[str, tuple[float, float]] = {}
    for past in sorted({round(last * i / _PLACES) for i in range(_PLACES + 1)}):
        for name, value in run_host(host, *host_arguments(sizes, past, sizes.tokens)).items():
            if value.is_floating_point():
                low, high = ranges.get(name, (0.0, 0.0))
                ranges[name] = min(low, float(value.min())), max(high, float(value.max()))
    for name in list(ranges):
        if name.startswith(COS):  # 1 at position 0, times what the model multiplies both with
            high = ranges[name][1]
            ranges[name] = ranges[name.replace(COS, SIN)] = -high, high
    return {name: _between(low, high) for name, (low, high) in ranges.items()}


def _between(low: float, high: float) -> Encoding:
    return encoding_from_range(torch.tensor(low), torch.tensor(high), _SIXTEEN_BITS)


def _evaluated(node: Node, source: Node, value: Tensor) -> Tensor:
    """A value computed from `source`, if that is `value`."""
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
