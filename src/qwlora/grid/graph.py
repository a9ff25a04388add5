"""What a simulation hands to a writer: one captured graph, and which of its values have which encodings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch.export import ExportedProgram

from qwlora.grid.encoding import Encoding


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
    """A captured program in which every mark has an encoding."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    marks: tuple[Mark, ...]
    encodings: Mapping[str, Encoding]
