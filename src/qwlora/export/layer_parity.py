"""An exported file against the simulation, layer by layer: each layer gets the simulation's own input, so nothing accumulates."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qwlora.export.onnx_runtime import OnnxLayers
from qwlora.graph.quantized_graph import Kind, QuantizedGraph


class Reference(Protocol):
    """What a file is compared with; `qwlora.simulate` makes one."""

    def logits(self, ids: Tensor) -> Tensor: ...
    def perturbed_logits(self, ids: Tensor) -> Tensor: ...
    def outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def perturbed_outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def values(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def bind(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def graph(self) -> QuantizedGraph: ...


@dataclass(frozen=True, kw_only=True)
class LayerLimits:
    """What the layers must keep to, in steps of each layer's own output grid."""

    layer_steps: float = 2.0
    layer_mean_steps: float = 0.05


@dataclass(frozen=True)
class LayerParity:
    """How far the layers are from the simulation's, in steps of each layer's own output grid.

    Args:
        worst_layer: the layer with the largest difference, `worst_layer_steps`.
        worst_layer_mean_steps: the largest mean difference of any layer.
        layers: how many were compared.
    """

    worst_layer: str
    worst_layer_steps: float
    worst_layer_mean_steps: float
    layers: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def broken_layer_limits(self, limits: LayerLimits) -> list[str]:
        """Each limit of layers that is not kept to, in words."""
        broken = []
        if not self.worst_layer_steps <= limits.layer_steps:
            broken.append(
                f"layer {self.worst_layer} is {self.worst_layer_steps:.2f} steps off (limit {limits.layer_steps:g})"
            )
        if not self.worst_layer_mean_steps <= limits.layer_mean_steps:
            broken.append(
                f"one layer is {self.worst_layer_mean_steps:.4f} steps off on average (limit {limits.layer_mean_steps:g})"
            )
        return broken


def compare_layers(folder: Path, reference: Reference, batch: Mapping[str, Any]) -> LayerParity:
    """Run every layer of the file in `folder` on what the simulation has at its input for `batch` (the model's arguments)."""
    graph = reference.graph()
    values = reference.values(batch)
    activations = [mark.name for mark in graph.marks if mark.kind is Kind.ACTIVATION]
    if not activations:  # weights alone are quantized
        return LayerParity("", 0.0, 0.0, 0)
    with tempfile.TemporaryDirectory() as scratch:
        outputs = OnnxLayers(folder, activations, Path(scratch)).run(values, reference.bind(batch))
    found = []
    for name in activations:
        steps = (outputs[name] - values[name]).abs() / graph.encodings[name].scale
        found.append(torch.stack([steps.max(), steps.mean()]))
    largest, mean = torch.stack(found).unbind(1)  # whose max is nan where one is
    return LayerParity(
        activations[int(largest.argmax())],
        float(largest.max()),
        float(mean.max()),
        len(activations),
    )
