"""Move values that depend only on positions and masks to the host: some NPUs compute no integers.

    position_ids, attention_mask --> host graph --> position_ids_cos, position_ids_sin,
                                                    attention_mask (float) --> device graph

A value belongs to the host graph if it depends only on positions, the mask and constants: no
weight, no token and no cached tensor flows into it. If an operator of the device graph reads it,
the device graph gets an input instead:

    float       named after its origin: position_ids_cos, position_ids_sin, attention_mask;
                several are numbered: attention_mask, attention_mask_1
    integer     int32: position_ids of a learned embedding

In a graph without a key-value cache, the host graph starts from every input without an encoding:
token ids, masks, a time step. Moved values are named after that input; constant integers are named
`constant`.

Token ids are int32 too. No architecture is known by name. An operator on the device that reads a
boolean of the host graph or computes integers is refused; the message names it.

`lift_scaling` makes alpha / rank an input of the device graph:

    base(x) + lora_B(lora_A(x)) * 2.0     -->  ... * lora_alpha
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from qwlora.errors import CaptureError
from qwlora.graph.capture import EMBEDS, IDS, MASK, POSITIONS
from qwlora.graph.graph_analysis import FACTOR, branch_nodes, computed_from
from qwlora.graph.nodes import (
    ancestors,
    calls,
    is_float,
    moved_from,
    operation,
    operator_of,
    parameter_names,
    place_of,
    stored_tensors,
)
from qwlora.graph.quantized_graph import Interface, QuantizedGraph, with_graph

COS, SIN = f"{POSITIONS}_cos", f"{POSITIONS}_sin"
# names of the host graph's inputs; its outputs have those that the device graph's inputs have
HOST_INPUTS = {MASK: "token_mask", POSITIONS: "token_positions"}
_DECIDING = frozenset({MASK, POSITIONS})
_NOT_CONSTANT = frozenset({"dequantize", "embedding"})  # of weights


def host_input(name: str) -> str:
    """The name of the host graph's input for an input of the model."""
    return HOST_INPUTS.get(name, f"{name}.input")


def lift_host_inputs(
    program: ExportedProgram,
    interface: Interface,
    floor: float,
    deciding_inputs: Collection[str] = _DECIDING,
) -> tuple[ExportedProgram, Interface, QuantizedGraph]:
    """Split a program with static shapes into a device program with its interface and a host graph.

    The host graph takes `deciding_inputs` (`host_input`). The device program takes token ids
    (int32), the outputs of the host graph, and the other inputs. Masked entries of a float mask
    become `floor`.
    """
    graph = copy.deepcopy(program.graph)
    inputs = dict(zip(program.graph_signature.user_inputs, interface.inputs, strict=True))
    fixed = stored_tensors(program) - set(parameter_names(program))
    deciding = {name for name, called in inputs.items() if called in deciding_inputs}
    constants = computed_from(program, fixed, _NOT_CONSTANT)
    decided = computed_from(program, fixed | deciding, _NOT_CONSTANT) - constants
    # each layer repeats masks and positions, and each copy would become an input
    _merge_equal_(graph, constants | decided)
    # without a cache, integer constants are lifted too, but for the codes of packed weights
    indices = {
        n.name
        for n in graph.nodes
        if n.name in constants and is_float(n) is False and not interface.cached
        if all(operation(user) != "dequantize" for user in n.users)
    }
    lifted = [
        n
        for n in graph.nodes
        if (n.name in decided or n.name in indices)
        and any(user.name not in decided | constants for user in n.users)
    ]
    for node in lifted:
        value = node.meta["val"]
        if value.dtype == torch.bool or value.is_complex():
            user = next(user for user in node.users if user.name not in decided)
            kind = "a complex number" if value.is_complex() else "a boolean mask"
            source = operator_of(node)
            raise _no_float(user, f"reads {kind} that positions and masks decide ({source})")
    names = _names(lifted, decided, inputs)
    host = _host(program, graph, names, constants | decided, floor)
    device, device_inputs = _device(program, graph, names, decided, inputs, deciding_inputs)
    for node in calls(device):
        if is_float(node) is False:
            kind = str(node.meta["val"].dtype).removeprefix("torch.")
            raise _no_float(node, f"computes {kind} values from tokens, weights or the cache")
    lifted_shapes = {name: tuple(map(int, n.meta["val"].shape)) for n, name in names.items()}
    taken = [inputs[name] for name in host.graph_signature.user_inputs]
    host_shapes = {host_input(name): interface.shapes[name] for name in taken}
    primary, all_shapes = next(iter(lifted_shapes), ""), host_shapes | lifted_shapes
    host_interface = Interface(tuple(host_shapes), tuple(lifted_shapes), primary, all_shapes)
    shapes = {**interface.shapes, **lifted_shapes}
    shapes = {name: shapes[name] for name in (*device_inputs, *interface.outputs)}
    device_interface = replace(interface, inputs=device_inputs, shapes=shapes)
    return device, device_interface, QuantizedGraph(host, host_interface, (), {})


def run_host(host: QuantizedGraph, mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """Inputs of the device graph by name, from int64 mask [1, context], 1 where there is a token,
    and positions [1, tokens], or [3, 1, tokens] if the model counts three axes (text: equal)."""
    shape = host.interface.shapes.get(HOST_INPUTS[POSITIONS], positions.shape)
    given = {HOST_INPUTS[MASK]: mask, HOST_INPUTS[POSITIONS]: positions.expand([*map(int, shape)])}
    run = host.program.module(check_guards=False)
    outputs = run(*(given[name] for name in host.interface.inputs))
    return dict(zip(host.interface.outputs, outputs, strict=True))


def _merge_equal_(graph: Graph, names: set[str]) -> None:
    first: dict[object, Node] = {}
    for node in list(graph.nodes):
        # an in-place operator may overwrite a value that others read then
        is_overwritten = any(operator_of(user).endswith("_") for user in node.users)
        if node.op != "call_function" or node.name not in names or is_overwritten:
            continue
        key = (node.target, str(node.args), str(node.kwargs))
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
        else:
            first[key] = node


def _no_float(node: Node, problem: str) -> CaptureError:
    return CaptureError(
        f"{place_of(node)} ({operator_of(node)}) {problem}, but an accelerator takes floats. "
        "Export without NPU graphs"
    )


def _names(lifted: Sequence[Node], decided: set[str], inputs: Mapping[str, str]) -> dict[Node, str]:
    """A name for each lifted node, in order of names: masks, cosines, sines, positions."""
    nodes: dict[str, list[Node]] = {stem: [] for stem in (MASK, COS, SIN, POSITIONS)}
    for node in lifted:
        read = ancestors(node, lambda n: n.name in decided)
        made_from = [n for n in read if n.name in decided]
        waves = {operation(n) for n in made_from} & {"cos", "sin"}
        sources = {inputs[n.name] for n in made_from if n.op == "placeholder"}
        stem = MASK if MASK in sources else min(sources, default="constant")
        if len(waves) == 1 and stem in _DECIDING:
            stem = f"{POSITIONS}_{waves.pop()}"
        nodes.setdefault(stem, []).append(node)
    return {
        node: f"{stem}_{number}" if number else stem
        for stem, named in nodes.items()
        for number, node in enumerate(named)
    }


def _host(
    program: ExportedProgram,
    graph: Graph,
    names: Mapping[Node, str],
    decided: set[str],
    floor: float,
) -> ExportedProgram:
    """The program that computes the nodes in `names`."""
    # as an accelerator takes them: integers of 32 bits, no number below `floor` in a mask
    host = Graph()
    copied: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.name in decided:
            copied[node] = host.node_copy(node, copied.__getitem__)
    results = []
    for node, name in names.items():
        value, result = node.meta["val"], copied[node]
        if not value.is_floating_point():
            result = host.call_function(torch.ops.aten.to.dtype, (result, torch.int32))
        elif name.startswith(MASK):
            # masked entries are -3e38 in the model, and a grid cannot hold both them and scores
            result = host.call_function(torch.ops.aten.clamp.default, (result, floor))
        result.meta["val"] = _int32(value)
        results.append(result)
    host.output(tuple(results))
    host.eliminate_dead_code()
    for node in list(host.nodes):
        if node.op == "placeholder" and not node.users:
            host.erase_node(node)
    return with_graph(program, host)


def _device(
    program: ExportedProgram,
    graph: Graph,
    names: Mapping[Node, str],
    decided: set[str],
    inputs: Mapping[str, str],
    deciding_inputs: Collection[str],
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """The program with an input for each lifted node, and the names of its inputs."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    called = {n: inputs[n.name] for n in placeholders if n.name in inputs}
    last = placeholders[-1]
    for node, name in names.items():
        with graph.inserting_after(last):
            last = given = graph.placeholder(f"lifted_{name}")
        given.meta["val"] = _int32(node.meta["val"])
        node.replace_all_uses_with(given, delete_user_cb=lambda user: user.name not in decided)
        called[given] = name
    for node in list(graph.nodes):
        source = moved_from(node)
        if source is None or is_float(node) is not False or is_float(source) is None:
            continue
        if node.meta["val"].shape == source.meta["val"].shape:  # a view of ids
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code()
    for node in list(called):
        if called[node] in deciding_inputs and node.name in inputs:
            graph.erase_node(node)
            del called[node]
        elif called[node] == IDS:
            node.meta["val"] = _int32(node.meta["val"])
    # tokens first, then what was lifted, then the cache
    given_order = sorted(called, key=lambda n: (called[n] not in (IDS, EMBEDS), n.name in inputs))
    for node in given_order:
        last = graph.find_nodes(op="placeholder")[-1]
        if node is not last:
            last.append(node)
    return with_graph(program, graph), tuple(called[node] for node in given_order)


def _int32(value: Tensor) -> Tensor:
    return value if value.is_floating_point() else value.to(torch.int32)


ALPHA = "lora_alpha"


def lift_scaling(
    program: ExportedProgram, interface: Interface
) -> tuple[ExportedProgram, Interface]:
    """The program of an adapter with the scaling as its last input, which every layer reads."""
    # as an input, a runtime can switch adapters and their strength
    graph, names = copy.deepcopy(program.graph), _scalings(program)
    scaled = [node for node in graph.nodes if node.name in names]
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        alpha = graph.placeholder(ALPHA)
    alpha.meta["val"] = scaled[0].meta["val"].new_zeros(1)
    for node in scaled:
        node.args = (node.args[0], alpha)
    inputs, shapes = (*interface.inputs, ALPHA), {**interface.shapes, ALPHA: (1,)}
    return with_graph(program, graph), replace(interface, inputs=inputs, shapes=shapes)


def scaling_of(program: ExportedProgram) -> float | None:
    """alpha / rank of the adapter in a graph, one for all layers; None if there is none."""
    scalings = sorted(set(_scalings(program).values()))
    if len(scalings) > 1:
        raise CaptureError(
            f"layers of the adapter have {len(scalings)} different scalings ({scalings[0]:g} to "
            f"{scalings[-1]:g}), and a graph has one input for all. Train the adapter without "
            "rank_pattern and alpha_pattern"
        )
    return scalings[0] if scalings else None


def _scalings(program: ExportedProgram) -> dict[str, float]:
    """The number that each node of an adapter multiplies with, by the node's name."""
    branch = branch_nodes(program, FACTOR)
    return {
        node.name: float(node.args[1])
        for node in calls(program)
        if node.name in branch and operation(node) == "mul"
        if isinstance(node.args[1], int | float)
    }
