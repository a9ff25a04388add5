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
class Interface:
    """What goes into a captured graph and what comes out of it: tensors with names, in the graph's order.

    Args:
        inputs: names; those inside nested arguments are paths, `added_cond_kwargs.time_ids`.
        outputs: likewise, of the tensors in the model's result.
        primary: the output that is compared first: `logits` if there is one, else the first that is floating point.
        shapes: of every input and output; an axis that may have any size has a name (`batch`, `tokens`, `sample.2`), one that the model fixes its number.
        cached: the inputs that are keys and values of earlier tokens. They come from this graph's outputs (`present`), and lie on those grids already.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    primary: str
    shapes: Mapping[str, tuple[str | int, ...]]
    cached: frozenset[str] = frozenset()

    @property
    def fixed(self) -> dict[str, dict[int, int]]:
        """Of every input, the axes whose size the graph holds as a constant."""
        return {
            name: {
                axis: size for axis, size in enumerate(self.shapes[name]) if isinstance(size, int)
            }
            for name in self.inputs
        }


@dataclass(frozen=True)
class QuantizedGraph:
    """A captured program in which every mark has an encoding; that of a base weight may have float offsets.

    Args:
        observer: the observer that chose the ranges of activations.
    """

    program: ExportedProgram
    interface: Interface
    marks: tuple[Mark, ...]
    encodings: Mapping[str, Encoding | FloatOffsetEncoding]
    observer: str = "min-max"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs."""
        return self.interface.inputs


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
