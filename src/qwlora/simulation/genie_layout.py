"""The layout in which Qualcomm's Genie passes positions and cache to a graph of `npu_graph`.

    position_ids_cos, position_ids_sin    [1, 1, tokens, width / 2]; in the graph, both halves of
                                          the rotated width are these numbers
    past_key_0_in                         [heads, 1, width, past]; past_key_0_out with the new ones
    past_value_0_in                       [heads, 1, past, width]; past_value_0_out with the new
    lora_alpha                            1 is the adapter as it was trained: alpha / rank is in
                                          the grids of lora_B and of what it computes

Values are only moved, and codes stay, so the graph computes what it did, bit for bit.

Source: `qai_hub_models/models/_shared/llm/model.py` of Qualcomm's ai-hub-models 0.47, and the
shapes that Genie's HTP engine checks when it loads a binary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from qwlora.errors import CaptureError, listed
from qwlora.graph.capture import IDS, MASK
from qwlora.graph.device_graph import ALPHA, COS, SIN
from qwlora.graph.nodes import origin
from qwlora.graph.quantized_graph import GraphValue, Kind, QuantizedGraph, with_graph
from qwlora.grid.encoding import Encoding
from qwlora.simulation.kv_cache_graph import NpuGraph, encoding_before, in_graph_order

_KEY, _VALUE = (1, 0, 3, 2), (1, 0, 2, 3)  # how keys and values are permuted, there and back


def token_axis(name: str) -> int:
    """The axis of tokens in a cached tensor."""
    return 3 if "_key_" in name else 2


def genie_layout(npu: NpuGraph, scaling: float | None) -> NpuGraph:
    """A graph of `npu_graph` with Genie's inputs and outputs. `scaling` is the alpha / rank that
    all of its adapters have. Inputs that Genie does not compute are refused."""
    device, graph = npu.device, copy.deepcopy(npu.device.program.graph)
    interface, shapes = device.interface, dict(device.interface.shapes)
    names = dict(zip(device.program.graph_signature.user_inputs, interface.inputs, strict=True))
    needed, taken = {IDS, MASK, COS, SIN}, {*names.values()} - interface.cached - {ALPHA}
    if taken != needed:
        parts = {"also takes": taken - needed, "does not take": needed - taken}
        problem = " and ".join(f"{verb} {listed(sorted(n))}" for verb, n in parts.items() if n)
        raise CaptureError(
            f"Genie gives every model {listed(sorted(needed))}, and this graph {problem}. "
            "Export without layout: genie"
        )
    marks = {mark.node: mark for mark in device.marks}
    encodings = dict(device.encodings)

    def mark_moved(node: Node, source: Node, name: str) -> None:
        encoding = encoding_before(source, marks, encodings)
        if encoding is not None:  # else all activations are float
            marks[node.name] = GraphValue(node.name, name, Kind.ACTIVATION)
            encodings[name] = encoding

    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in [n for n in graph.nodes if names.get(n.name) in {COS, SIN, *interface.cached}]:
        name, value, users = names[node.name], node.meta["val"], list(node.users)
        with graph.inserting_before(first):
            if name in interface.cached:
                order = _KEY if "_key_" in name else _VALUE
                node.meta["val"] = value.permute(order).contiguous()
                moved = whole = _call(graph, "permute", node, order)
            else:
                node.meta["val"] = value.new_empty(1, 1, value.shape[-2], value.shape[-1] // 2)
                moved = _call(graph, "cat", [node, node], -1)
                whole = _call(graph, "reshape", moved, list(value.shape))
        for user in users:
            user.replace_input_with(node, whole)
        mark_moved(moved, node, f"{name}.moved")
        shapes[name] = tuple(node.meta["val"].shape)
    output = graph.output_node()
    results: list[Any] = list(output.args[0])
    for index, name in enumerate(interface.outputs):
        if name.startswith("past_"):
            source = results[index]
            with graph.inserting_before(output):
                order = _KEY if "_key_" in name else _VALUE
                results[index] = _call(graph, "permute", source, order)
            mark_moved(results[index], source, f"{name}.moved")
            shapes[name] = tuple(results[index].meta["val"].shape)
    output.args = (tuple(results),)
    if scaling:
        _make_relative_(graph, names, marks, encodings, scaling)
    program = with_graph(device.program, graph)
    moved_device = QuantizedGraph(
        program,
        replace(interface, shapes=shapes),
        in_graph_order(program, marks),
        encodings,
        device.observer,
    )
    return replace(npu, device=moved_device)


def _make_relative_(
    graph: Graph,
    names: Mapping[str, str],
    marks: Mapping[str, GraphValue],
    encodings: dict[str, Encoding],
    scaling: float,
) -> None:
    """Move `scaling` from the grid of lora_alpha to those of lora_B and of what it computes."""
    (alpha,) = (node for node in graph.nodes if names.get(node.name) == ALPHA)
    changed = {ALPHA: 1 / scaling}
    for user in alpha.users:
        product: Any = origin(next(read for read in user.all_input_nodes if read is not alpha))
        for read in (product, *map(origin, product.all_input_nodes)):
            mark = marks.get(read.name)
            if mark is not None and (read is product or mark.kind is Kind.ADAPTER):
                changed[mark.name] = scaling
    for name, factor in changed.items():
        encodings[name] = replace(encodings[name], scale=encodings[name].scale * factor)


def _call(graph: Graph, name: str, *arguments: Any) -> Node:
    """A call of an operator of torch, with the shape of its result."""
    target = getattr(torch.ops.aten, name).default
    node = graph.call_function(target, arguments)
    node.meta["val"] = target(*map_arg(arguments, lambda read: read.meta["val"]))
    return node
