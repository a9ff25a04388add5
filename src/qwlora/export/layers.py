"""An exported file against the simulation, layer by layer: each layer gets the simulation's own input, so nothing accumulates."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from qwlora.export.onnx_runtime import OnnxLayers
from qwlora.grid.graph import Kind, QuantizedGraph


class Reference(Protocol):
    """What a file is compared with; `qwlora.simulate` makes one."""

    def logits(self, ids: Tensor) -> Tensor: ...
    def perturbed_logits(self, ids: Tensor) -> Tensor: ...
    def outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def perturbed_outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def values(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def bind(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def graph(self) -> QuantizedGraph: ...


@dataclass(frozen=True)
class LayerDifference:
    """How far the layers are from the simulation's, in steps of each layer's own output grid.

    Args:
        worst: the layer with the largest difference, `steps`.
        mean_steps: the largest mean difference of any layer.
        count: of the layers.
    """

    worst: str
    steps: float
    mean_steps: float
    count: int


def compare_layers(folder: Path, reference: Reference, batch: Mapping[str, Any]) -> LayerDifference:
    """Run every layer of the file in `folder` on what the simulation has at its input for `batch` (the model's arguments)."""
    graph = reference.graph()
    values = reference.values(batch)
    activations = [mark.name for mark in graph.marks if mark.kind is Kind.ACTIVATION]
    if not activations:  # weights alone are quantized
        return LayerDifference("", 0.0, 0.0, 0)
    with tempfile.TemporaryDirectory() as scratch:
        outputs = OnnxLayers(folder, activations, Path(scratch)).run(values, reference.bind(batch))
    worst, largest, largest_mean = "", -1.0, 0.0
    for name in activations:
        steps = (outputs[name] - values[name]).abs() / graph.encodings[name].scale
        if float(steps.max()) > largest:
            worst, largest = name, float(steps.max())
        largest_mean = max(largest_mean, float(steps.mean()))
    return LayerDifference(worst, largest, largest_mean, len(activations))
