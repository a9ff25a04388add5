"""The graph of a simulation with a key-value cache as inputs and outputs.

    simulation = simulate(model, {"input_ids": ids, "attention_mask": mask})     # calibrated
    graph = cached_graph(simulation, capture_with_cache(simulation))
    export_onnx(graph, folder)

It has the simulation's weights. Encodings carry over by name, so all graphs of a model share one
set. Without past tokens the graph computes the full sequence, bit for bit. It is captured by:

    captured = capture_cached(model)                                      # any tokens, any past
    captured = capture_cached(model, CacheSizes(tokens=128, context=1024))     # static, one row

    input_ids, attention_mask, position_ids, past_key_values.0.key, past_key_values.0.value, ...
        -> logits, present.0.key, present.0.value, ...

attention_mask is [batch, past + tokens], keys and values are [batch, heads, past, width]. Every
layer keeps the whole past: tokens outside a sliding window are masked, not dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product, starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from qwlora.adapter.attach import activate_, restored_adapters
from qwlora.adapter.padded_adapters import padded_adapters
from qwlora.errors import CaptureError, foreign_as, listed
from qwlora.graph.call_arguments import Structure
from qwlora.graph.capture import EMBEDS, IDS, MASK, PAST, POSITIONS, PRESENT, Captured, capture
from qwlora.graph.nodes import (
    calls,
    moved_from,
    operation,
    used_placeholders,
)
from qwlora.graph.quantized_graph import GraphValue, Kind, QuantizedGraph, rebuilt, with_graph
from qwlora.grid.encoding import Encoding
from qwlora.grid.scheme import as_estimator
from qwlora.simulation.placement import place
from qwlora.simulation.simulation import Simulation
from qwlora.system.device import device_of
from qwlora.system.parameter_names import adapter_of, canonical_name

CONTEXT = "context"  # name of the size of past and new tokens together
# torch.export gives axes of equal size one symbol, so these sizes and their sum differ
_EXAMPLE_TOKENS, _EXAMPLE_PAST = 3, 5
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class CacheSizes:
    """The sizes of a static graph: new tokens per call, and new and past tokens together."""

    tokens: int
    context: int

    def __post_init__(self) -> None:
        if not 1 <= self.tokens < self.context:
            raise CaptureError(
                f"a graph of {self.tokens} tokens in a context of {self.context} has no cache. "
                "Choose at least 1 token, and fewer tokens than the context"
            )

    @property
    def past(self) -> int:
        """Tokens that the cache holds."""
        return self.context - self.tokens

    @property
    def name(self) -> str:
        """The graph's name, as in Qualcomm's recipes."""
        kind = "token" if self.tokens == 1 else "prompt"
        return f"{kind}_ar{self.tokens}_cl{self.context}"


def cache_sizes(tokens: Iterable[int], contexts: Iterable[int]) -> tuple[CacheSizes, ...]:
    """The sizes of a graph for each number of new tokens in each context."""
    return tuple(starmap(CacheSizes, product(tokens, contexts)))


def capture_cached(
    model: nn.Module, sizes: CacheSizes | None = None, like: Captured | None = None
) -> Captured:
    """The graph of a causal language model that continues a sequence.

    With `sizes`, it has one row and returns keys and values of the new tokens only. Without, it
    takes any number of rows, tokens and past tokens, and returns keys and values of all of them. It
    takes embeddings, and positions with three axes, if `like` does.
    """
    tokens, past = (sizes.tokens, sizes.past) if sizes else (_EXAMPLE_TOKENS, _EXAMPLE_PAST)
    rows = 1 if sizes else 2
    ids = torch.ones(rows, past + tokens, dtype=torch.int64, device=device_of(model))
    table, shapes = (like.embeddings, like.interface.shapes) if like else (None, {})
    axes = (3,) if len(shapes.get(POSITIONS, ())) == 3 else ()
    example = {
        **({IDS: ids[:, past:]} if table is None else {EMBEDS: table(ids[:, past:]).detach()}),
        MASK: torch.ones_like(ids),
        POSITIONS: torch.arange(past, past + tokens).expand(*axes, rows, tokens),
        PAST: _example_cache(model, ids[:, :2], past),
    }
    captured = capture(model, example, static=sizes is not None)
    if sizes is None:
        names = {f"{MASK}.1", *(f"{name}.2" for name in captured.interface.outputs)}
        shapes = {
            name: tuple(CONTEXT if size in names else size for size in shape)
            for name, shape in captured.interface.shapes.items()
        }
        return replace(captured, interface=replace(captured.interface, shapes=shapes))
    return _only_new(captured)


def cache_additions(captured: Captured) -> dict[str, tuple[Node, Node, Node]]:
    """By the name of each past input: its node, the node of the new keys or values, and the node
    that joins both."""
    additions, names = {}, captured.input_names
    for node in calls(captured.program):
        match operation(node), *node.args:
            case "cat", [Node() as past, Node() as new], *_:
                if (name := names.get(past.name)) in captured.interface.cached:
                    additions[name] = past, new, node
    return additions


def _example_cache(model: nn.Module, ids: Tensor, past: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of `past` tokens, with the shapes of the model's own cache for `ids`."""
    kind = type(model).__name__
    remedy = "only a causal language model has a graph with a cache"
    problem = f"{kind} does not run with input_ids and use_cache=True"
    with foreign_as(CaptureError, problem, remedy), torch.no_grad():
        result = model(input_ids=ids, use_cache=True)
    cache = result.get(PAST) if isinstance(result, Mapping) else None
    _, tensors = Structure.of({PAST: cache})
    if not tensors or any(t.ndim != 4 or t.shape[2] != ids.shape[1] for t in tensors):
        raise CaptureError(
            f"{kind} returns no {PAST} with keys and values [batch, heads, tokens, width], so it "
            "has no graph with a cache. Export it without one"
        )
    # a fixed pattern, so that every capture sees the same data
    g = torch.Generator().manual_seed(0)
    cached = [torch.randn(*t.shape[:2], past, t.shape[3], generator=g).to(t) for t in tensors]
    return list(zip(cached[::2], cached[1::2], strict=True))


def _only_new(captured: Captured) -> Captured:
    """The graph that returns keys and values of the new tokens only."""
    interface, additions = captured.interface, cache_additions(captured)
    graph = copy.deepcopy(captured.program.graph)
    nodes, output = {node.name: node for node in graph.nodes}, graph.output_node()
    results, shapes = [], dict(interface.shapes)
    for name, node in zip(interface.outputs, output.args[0], strict=True):
        if name.startswith(f"{PRESENT}."):
            past = f"{PAST}{name.removeprefix(PRESENT)}"
            _, new, whole = additions.get(past, (node, node, None))
            if whole is None or whole.name != node.name:
                raise CaptureError(
                    f"output {name} is not input {past} with new tokens after it, so there is no "
                    "output of the new tokens alone. Export the whole keys and values"
                )
            node = nodes[new.name]
            tokens = shapes[IDS if IDS in shapes else EMBEDS][1]
            shapes[name] = (*shapes[name][:2], tokens, *shapes[name][3:])
        results.append(node)
    output.args = (tuple(results),)
    program = with_graph(captured.program, graph)
    return replace(captured, program=program, interface=replace(interface, shapes=shapes))


def capture_with_cache(simulation: Simulation, sizes: CacheSizes | Batch | None = None) -> Captured:
    """`capture_cached` for the simulation's model, with the simulation's adapter active and padded
    as there. For a batch: the graph without a cache, for inputs of the batch's shapes."""
    origin = simulation.origin
    used, model = {adapter_of(name) for name in _used(simulation.program)}, origin.model
    adapters = [str(name) for name in used - {None}]
    with restored_adapters(model), padded_adapters(model, adapters, origin.ranks):
        if adapters:
            activate_(model, adapters)
        if sizes is None or isinstance(sizes, CacheSizes):
            return capture_cached(model, sizes, simulation.captured)
        return capture(model, sizes, static=True)


def cached_graph(
    simulation: Simulation, captured: Captured, quantize_past: bool = True
) -> QuantizedGraph:
    """The graph of `captured` with the grids and weights of a calibrated simulation.

    Args:
        captured: from `capture_cached`, with an adapter of the simulation's structure active.
        quantize_past: False for runtimes that keep the cache as floats: it has no encodings then.
    """
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
    # An earlier call returned past keys and values on the grid of the new ones. So the graph
    # prefills and decodes on the grids of the full sequence.
    for past, new, whole in cache_additions(captured).values() if quantize_past else ():
        encoding = encoding_before(new, marks, encodings)
        for node in (past, whole):
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
    """The encoding of a value, or of the value that data movement took it from."""
    source: Node | None = node
    while source is not None and source.name not in marks:
        source = moved_from(source)
    return None if source is None else known[marks[source.name].name]


def _with_weights(program: ExportedProgram, source: ExportedProgram) -> ExportedProgram:
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
    """Names of the parameters and buffers that the graph reads, without inactive adapters."""
    placeholders = used_placeholders(program)
    return [
        str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.target in program.state_dict and spec.arg.name in placeholders
    ]
