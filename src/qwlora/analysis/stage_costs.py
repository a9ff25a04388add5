"""Where a simulation's loss comes from.

    adapted            base weights are integers, the rest is float
    adapter_weights    and lora_A and lora_B are on their grids
    parameters         and so are norm weights, biases and whatever else step 1 left float
    activations        and so is every activation: the simulation as it is exported

Each step keeps what the steps before it switched on. `layer_sqnr` says how far each value has come from the float graph's by then, errors of the layers before
it included.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from qwlora.graph.quantized_graph import Kind
from qwlora.grid.sqnr import sqnr_db
from qwlora.progress import Track, untracked
from qwlora.simulation.simulation import Simulation


def account(
    simulation: Simulation, measure: Callable[[], float], track: Track = untracked
) -> dict[str, float]:
    """`measure()` after each thing is switched on, by the names of the module's text; steps that switch nothing on are left out.

    Raises:
        CalibrationError: an activation has no encoding yet.
    """
    simulation.encodings  # noqa: B018 (raises before anything is run)
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
    for name, switched_on in track(list(steps.items()), "accounting for the loss", len(steps)):
        with simulation.only(*switched_on):
            found[name] = measure()
    return found


@torch.no_grad()
def layer_sqnr(
    simulation: Simulation, batches: Collection[Mapping[str, Any]], track: Track = untracked
) -> dict[str, float]:
    """`10 log10 (sum x^2 / sum (x_hat - x)^2)` of each quantized activation, in dB: x from the float graph, x_hat from the simulation.

    Args:
        batches: the model's arguments; two sets of all values of one batch are in memory.
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
