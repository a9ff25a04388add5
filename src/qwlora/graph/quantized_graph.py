"""The input of exporters: a captured graph with the encodings of its values. Helpers to edit it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_structure

from qwlora.graph.value_traits import Decision, GridOptions, Trait
from qwlora.grid.encoding import Encoding
from qwlora.system.device import CPU, moved

_PARTS = (
    "graph graph_signature state_dict range_constraints module_call_graph example_inputs constants "
    "verifiers"
)


class Kind(StrEnum):
    """The kind of a quantized value."""

    BASE = "base"  # a packed weight of the frozen base
    ADAPTER = "adapter"  # a LoRA weight
    PARAMETER = "parameter"  # any other float weight or bias
    ACTIVATION = "activation"


@dataclass(frozen=True)
class GraphValue:
    """A floating-point value of a captured graph, and the placement decision about it.

    Args:
        node: name of the node in the program's graph.
        name: name of the encoding, and of the tensor in every exported file.
        operator: the operator that computed it; `weight` or `input` if there is none.
        module, module_class: path and class of the innermost module that computed it.
        owner: class of the enclosing module that is one operation; empty if there is none.
        reason: the reason of the rule that decided.
        rule: index of the user's rule that decided; None if a rule of the policy did.
        grid: the value's grid as text. Only `Simulation.explain` sets it and the next three.
        observer: how an activation's range is chosen.
        low, high: ends of an activation's grid, once calibrated or fixed.
    """

    node: str
    name: str
    kind: Kind
    operator: str = ""
    module: str = ""
    module_class: str = ""
    traits: frozenset[Trait] = frozenset()
    owner: str = ""
    decision: Decision = Decision.QUANTIZE
    reason: str = ""
    rule: int | None = None
    options: GridOptions = GridOptions()
    grid: str = ""
    observer: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def is_computed(self) -> bool:
        """Whether it is neither a weight nor an input."""
        return self.operator not in ("weight", "input")

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a rule's glob matches; see `PlacementRule`."""
        made_by = f"{self.module}.{self.operator}" if self.module and self.is_computed else ""
        return tuple(name for name in (self.name, self.module, made_by) if name)

    def to_json(self) -> dict[str, Any]:
        """The value's entry in the placement log."""
        omitted = {"node", "traits", "owner", "rule", "options"}
        return {key: value for key, value in vars(self).items() if key not in omitted}


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a captured graph, in order.

    Args:
        inputs: names; a path for nested arguments, such as `added_cond_kwargs.time_ids`.
        outputs: names of the tensors in the model's result.
        primary: the output to compare: `logits`, or the first floating-point output.
        shapes: shape of every input and output. A dynamic axis has a name (`batch`, `tokens`,
            `sample.2`), a fixed axis its size.
        cached: inputs that hold keys and values of earlier tokens. They are outputs (`present`) of
            an earlier call, so they are already on their grids.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    primary: str
    shapes: Mapping[str, tuple[str | int, ...]]
    cached: frozenset[str] = frozenset()


@dataclass(frozen=True)
class QuantizedGraph:
    """A captured program with an encoding for every mark; base weights may have float offsets.
    `observer` names the estimator that chose the ranges of activations."""

    program: ExportedProgram
    interface: Interface
    marks: tuple[GraphValue, ...]
    encodings: Mapping[str, Encoding]
    observer: str = "min-max"

    def __post_init__(self) -> None:
        encodings = {name: e.to(CPU) for name, e in self.encodings.items()}
        object.__setattr__(self, "encodings", encodings)
        tensors = self.program.state_dict.values(), self.program.constants.values()
        if any(isinstance(t, Tensor) and t.device != CPU for t in chain(*tensors)):
            object.__setattr__(self, "program", program_on_cpu(self.program))

    @property
    def activation_bitwidths(self) -> list[int]:
        """The bitwidth of each activation that has an encoding."""
        activations = (mark for mark in self.marks if mark.kind is Kind.ACTIVATION)
        return [self.encodings[mark.name].scheme.bitwidth for mark in activations]

    @property
    def has_float_activations(self) -> bool:
        """Whether no activation has an encoding."""
        return not self.activation_bitwidths


def insert_after(node: Node, make: Callable[[Node], Node], place: Node | None = None) -> Node:
    """Insert `make(node)` after `node` or `place`; all other users of `node` then read it."""
    with node.graph.inserting_after(place or node):
        inserted = make(node)
    inserted.meta = dict(node.meta)
    node.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)
    return inserted


def with_graph(program: ExportedProgram, graph: Graph) -> ExportedProgram:
    """`program` with another graph over its tensors; all other placeholders are inputs."""
    # the specs of the program, not copies: torch 2.13 warns about those
    tensors = {
        spec.arg.name: spec
        for spec in program.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT
    }
    inputs = [
        tensors.get(n.name)
        or InputSpec(InputKind.USER_INPUT, TensorArgument(name=n.name), target=None)
        for n in graph.nodes
        if n.op == "placeholder"
    ]
    results: Any = graph.output_node().args[0]
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=n.name), target=None)
        for n in results
    ]
    count = sum(spec.kind is InputKind.USER_INPUT for spec in inputs)
    entry = program.module_call_graph[0]
    assert entry.signature is not None
    call = replace(
        entry.signature,
        in_spec=tree_structure((tuple(range(count)), {})),
        out_spec=tree_structure(tuple(range(len(outputs)))),
        forward_arg_names=None,
    )
    graph.lint()
    return rebuilt(
        program,
        root=GraphModule(program.graph_module, graph),
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        module_call_graph=[replace(entry, signature=call)],
        example_inputs=None,
    )


def program_on_cpu(program: ExportedProgram) -> ExportedProgram:
    """A copy of `program` on the CPU. Tensors that are shared stay shared."""
    copies: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in copies:
            tensor = value.detach().to(CPU)
            is_parameter = isinstance(value, nn.Parameter)
            copies[id(value)] = nn.Parameter(tensor, False) if is_parameter else tensor
        return copies[id(value)]

    graph = copy.deepcopy(program.graph)
    # such as arange(..., device=cuda:0)
    for node in graph.nodes:
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda v: CPU if isinstance(v, torch.device) else v
        )
        node.meta["val"] = moved(node.meta.get("val"), CPU)
    return rebuilt(
        with_graph(program, graph),
        state_dict={name: copied(tensor) for name, tensor in program.state_dict.items()},
        constants={name: copied(value) for name, value in program.constants.items()},
    )


def rebuilt(program: ExportedProgram, **changes: Any) -> ExportedProgram:
    """`program` with other parts, such as `state_dict`: its parameters and buffers by name."""
    parts = {name: getattr(program, name) for name in _PARTS.split()}
    return ExportedProgram(**{"root": program.graph_module, **parts, **changes})
