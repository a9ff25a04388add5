"""Encodings that several adapters on one base share.

`base_activations` says which encodings change when a runtime switches adapters. Its values mean the
same as those of QAIRT's `quant_updatable_mode`:

    all             every activation and the adapter's weights; nothing is shared
    adapter_only    the LoRA branch: lora_A, lora_B, their outputs and the scaling of these. The sum
                    with the base layer's output and everything computed from it has one encoding
                    for all adapters, as have the other activations of the base
    none            nothing: all activations and adapter weights share one set of encodings, so
                    adapter weights must have the same shapes

A shared encoding covers everything that any adapter observed: observers of the same name are merged
and then estimated once. Base weights have one encoding in every mode.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from qwlora.errors import CalibrationError
from qwlora.graph.adapter_branch import branch_nodes
from qwlora.graph.graph_analysis import lora_branch
from qwlora.graph.move_graph import device_of, moved_encoding
from qwlora.grid.encoding import Encoding
from qwlora.grid.min_max import encoding_from_range, group_range
from qwlora.grid.scheme import Scheme
from qwlora.simulation.estimate_encodings import estimate_encodings
from qwlora.simulation.fake_quantizer import Quantizer
from qwlora.simulation.simulation import Simulation

BaseActivations = Literal["all", "adapter_only", "none"]


class SharedObservation:
    """Merged observations of the values that several simulations share.

    Args:
        base_activations: see the module's docstring.
    """

    def __init__(self, base_activations: BaseActivations):
        self.base_activations = base_activations
        self._activations: dict[str, Quantizer] = {}
        self._weights: dict[str, tuple[Scheme, Tensor, Tensor]] = {}  # scheme, low and high ends
        self._names: set[str] | None = None

    def add(self, simulation: Simulation) -> None:
        """Merge what a frozen simulation observed; with `none`, its adapter weights too.

        Raises:
            CalibrationError: a value has another shape or scheme than in earlier simulations, or
                with `none` a value is missing in one of them.
        """
        # a graph without any adapter lacks the adapter's values in every mode
        if self.base_activations == "none" and simulation.adapter_weights:
            self._check_names(simulation)
        for name in shared_activations(simulation, self.base_activations):
            quantizer = simulation.quantizers[name]
            earlier = self._activations.get(name)
            if earlier is None:
                self._activations[name] = copy.deepcopy(quantizer)
            elif earlier.scheme != quantizer.scheme:
                raise CalibrationError(
                    f"adapters disagree on the grid of {name} ({earlier.scheme} vs "
                    f"{quantizer.scheme}). Share less: base_activations all or adapter_only"
                )
            else:
                earlier.observer.merge(quantizer.observer)
        if self.base_activations == "none":
            encodings = simulation.encodings
            for name, weight in simulation.adapter_weights.items():
                self._add_weight(name, weight, encodings[name].scheme)

    def _add_weight(self, name: str, weight: Tensor, scheme: Scheme) -> None:
        low, high = group_range(weight, scheme)
        if name in self._weights:
            earlier, lowest, highest = self._weights[name]
            if earlier != scheme or lowest.shape != low.shape:
                raise CalibrationError(
                    f"adapters disagree on {name} ({list(lowest.shape)} scales of {earlier} vs "
                    f"{list(low.shape)} of {scheme}). To share its encoding, give them the same "
                    "rank; otherwise share less"
                )
            low, high = torch.minimum(low, lowest), torch.maximum(high, highest)
        self._weights[name] = scheme, low, high

    def _check_names(self, simulation: Simulation) -> None:
        names = {*simulation.quantizers, *simulation.adapter_weights}
        if self._names is None:
            self._names = names
        differing = sorted(names ^ self._names)
        if not differing:
            return
        if all(name in simulation.dropped or name in simulation.quantizers for name in differing):
            remedy = (
                "The calibration data of one adapter did not reach it: calibrate on more data, or "
                "add a rule with keep: float"
            )
        else:
            remedy = (
                "Adapters that share all encodings need the same target_modules, layers and dora; "
                "otherwise share less"
            )
        raise CalibrationError(
            f"{len(differing)} values have an encoding with one adapter and none with another, "
            f"{differing[0]} first. {remedy}"
        )

    def encodings(self) -> dict[str, Encoding]:
        """The shared encodings by name, in graph order of the first simulation."""
        for quantizer in self._activations.values():
            quantizer.encoding = None
        estimate_encodings(list(self._activations.values()))
        found = {
            name: q.encoding for name, q in self._activations.items() if q.encoding is not None
        }
        return found | {
            name: encoding_from_range(low, high, scheme)
            for name, (scheme, low, high) in self._weights.items()
        }


def shared_activations(simulation: Simulation, base_activations: BaseActivations) -> list[str]:
    """Names of the quantized activations whose encodings all adapters share, in graph order."""
    if base_activations == "all":
        return []
    own = lora_branch(simulation.program) if base_activations == "adapter_only" else set()
    return [
        mark.name
        for mark in simulation.marks
        if mark.name in simulation.quantizers and mark.node not in own
    ]


def apply_shared_encodings(
    simulation: Simulation, encodings: Mapping[str, Encoding], base_activations: BaseActivations
) -> None:
    """Replace encodings of a frozen simulation by the shared ones.

    With `adapter_only`, the sum of a layer that no earlier adapter changed keeps its own encoding.

    Raises:
        CalibrationError: a shared activation has no encoding in `encodings`.
        GridError: the shape of an encoding does not match its weight.
    """
    names = shared_activations(simulation, base_activations)
    sums = branch_nodes(simulation.program) if base_activations == "adapter_only" else set()
    optional = {mark.name for mark in simulation.marks if mark.node in sums}
    if missing := [name for name in names if name not in {*encodings, *optional}]:
        raise CalibrationError(
            f"{len(missing)} shared activations have no encoding, {missing[0]} first. Observe "
            "every adapter before freezing"
        )
    device = device_of(simulation.graph_module)
    for name in names:
        if name in encodings:
            simulation.quantizers[name].encoding = moved_encoding(encodings[name], device)
    if base_activations == "none":
        simulation.set_adapter_encodings(encodings)
