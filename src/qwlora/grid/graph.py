"""What a simulation hands to a writer: one captured graph, and which of its values have which encodings; and how both edit such a graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from qwlora.grid.encoding import Encoding
from qwlora.grid.float_offset import FloatOffsetEncoding


class Kind(StrEnum):
    """What a quantized value is."""

    BASE = "base"  # a packed weight of the frozen base
    ADAPTER = "adapter"  # a LoRA weight
    PARAMETER = "parameter"  # a weight or bias of the base that step 1 left float
    ACTIVATION = "activation"


@dataclass(frozen=True)
class Mark:
    """The value of one graph node has an encoding.

    Args:
        node: the node's name in the program's graph.
        name: the encoding's name; a tensor of every exported file carries it.
    """

    node: str
    name: str
    kind: Kind


@dataclass(frozen=True)
class QuantizedGraph:
    """A captured program in which every mark has an encoding; that of a base weight may have float offsets."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    marks: tuple[Mark, ...]
    encodings: Mapping[str, Encoding | FloatOffsetEncoding]


def insert_after(node: Node, make: Callable[[Node], Node], place: Node | None = None) -> Node:
    """Put `make(node)` behind `node` (or behind `place`, if given) and let all earlier users of `node` read the new one."""
    with node.graph.inserting_after(place or node):
        inserted = make(node)
    inserted.meta = dict(node.meta)
    node.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)
    return inserted


def with_graph(program: ExportedProgram, graph: Graph) -> ExportedProgram:
    """`program` with another graph over the same placeholders; output names are taken from the graph, tensors are shared."""
    signature = copy.deepcopy(program.graph_signature)
    (output,) = (n for n in graph.nodes if n.op == "output")
    for spec, node in zip(signature.output_specs, output.args[0], strict=True):
        spec.arg.name = node.name
    graph.lint()
    return ExportedProgram(
        GraphModule(program.graph_module, graph),
        graph,
        signature,
        program.state_dict,
        program.range_constraints,
        program.module_call_graph,
        program.example_inputs,
        program.constants,
        verifiers=program.verifiers,
    )
