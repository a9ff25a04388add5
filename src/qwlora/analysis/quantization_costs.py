"""How much each part of a simulation adds to the loss.

    adapted            only base weights are quantized
    adapter_weights    also lora_A and lora_B
    parameters         also norm weights, biases and everything else that step 1 left float
    activations        also activations: the simulation as it is exported

`layer_sqnr` compares each activation with the float graph, including errors of earlier layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from qwlora.graph.quantized_graph import Kind
from qwlora.grid.sqnr import sqnr_db
from qwlora.progress import Track, untracked
from qwlora.simulation.simulation import Simulation


def cumulative_costs(
    simulation: Simulation, measure: Callable[[], float], track: Track = untracked
) -> dict[str, float]:
    """`measure()` after each step above, by name. Steps that quantize nothing are omitted.

    Raises:
        CalibrationError: an activation has no encoding yet.
    """
    simulation.encodings  # noqa: B018 (raises if not calibrated)
    weights = {
        kind: [
            mark.name
            for mark in simulation.marks
            if mark.kind is kind and mark.name in simulation.weights
        ]
        for kind in (Kind.ADAPTER, Kind.PARAMETER)
    }
    steps: dict[str, list[str]] = {"adapted": []}
    if weights[Kind.ADAPTER]:
        steps["adapter_weights"] = weights[Kind.ADAPTER]
    if weights[Kind.PARAMETER]:
        steps["parameters"] = weights[Kind.ADAPTER] + weights[Kind.PARAMETER]
    if simulation.quantizers:
        steps["activations"] = [*simulation.weights, *simulation.quantizers]
    found = {}
    for name, quantized in track(list(steps.items()), "measuring costs", len(steps)):
        with simulation.only(*quantized):
            found[name] = measure()
    return found


@torch.no_grad()
def layer_sqnr(
    simulation: Simulation, batches: Collection[Mapping[str, Any]], track: Track = untracked
) -> dict[str, float]:
    """`10 log10 (sum x^2 / sum (x_hat - x)^2)` of each quantized activation, in dB.

    x is from the float graph, x_hat from the simulation.

    Args:
        batches: the model's arguments; all activations of a batch are in memory twice.
    """
    signal, noise = (
        dict.fromkeys(simulation.quantizers, 0.0),
        dict.fromkeys(simulation.quantizers, 0.0),
    )
    for batch in track(batches, "comparing layers", len(batches)):
        with simulation.only():
            expected = simulation.values(batch)
        for name, value in simulation.values(batch).items():
            signal[name] += float(expected[name].square().sum())
            noise[name] += float((value - expected[name]).square().sum())
    return {name: sqnr_db(signal[name], noise[name]) for name in signal}
