"""What quantization does to a simulation: how much each part adds to the loss, and how far its
activations are off.

adapted            only base weights are quantized
adapter_weights    also lora_A and lora_B
parameters         also norm weights, biases and everything else that step 1 left float
activations        also activations: the simulation as it is exported
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from qwlora.graph.quantized_graph import Kind
from qwlora.grid.encoding import sqnr_db
from qwlora.simulation.simulation import Simulation
from qwlora.system.progress import Track, untracked


def cumulative_costs(
    simulation: Simulation, measure: Callable[[], float], track: Track = untracked
) -> dict[str, float]:
    """`measure()` after each step above, by name. Steps that quantize nothing are omitted."""
    simulation.encodings  # noqa: B018 (raises if not calibrated)
    adapter, parameters = (
        [m.name for m in simulation.marks if m.kind is kind and m.name in simulation.weights]
        for kind in (Kind.ADAPTER, Kind.PARAMETER)
    )
    added = {
        "adapted": [],
        "adapter_weights": adapter,
        "parameters": parameters,
        "activations": list(simulation.quantizers),
    }
    steps = [(name, names) for name, names in added.items() if names or name == "adapted"]
    quantized, costs = list[str](), dict[str, float]()
    for name, names in track(steps, "measuring costs", len(steps)):
        quantized += names
        if name == "activations":
            quantized += simulation.weights
        with simulation.only(*quantized):
            costs[name] = measure()
    return costs


@torch.no_grad()
def layer_sqnr(
    simulation: Simulation, batches: Collection[Mapping[str, Any]], track: Track = untracked
) -> dict[str, float]:
    """`10 log10 (sum x^2 / sum (x_hat - x)^2)` of each quantized activation, in dB.

    x is from the float graph, x_hat from the simulation, with the errors of earlier layers.

    Args:
        batches: the model's arguments; all activations of a batch are in memory twice.
    """
    signal = dict.fromkeys(simulation.quantizers, 0.0)
    noise = dict(signal)
    for batch in track(batches, "comparing layers", len(batches)):
        with simulation.only():
            expected = simulation.values(batch)
        for name, value in simulation.values(batch).items():
            signal[name] += float(expected[name].square().sum())
            noise[name] += float((value - expected[name]).square().sum())
    return {name: sqnr_db(signal[name], noise[name]) for name in signal}


def encodings_summary(simulation: Simulation) -> dict[str, Any]:
    """`ranges` of activations by name (min = offset * scale, max = (offset + 2^bitwidth - 1) *
    scale, to six digits), and `bits`: the number of encodings by kind and bitwidth."""
    ranges: dict[str, dict[str, float]] = {}
    bits: dict[str, dict[str, int]] = {}
    for name, kind in {mark.name: mark.kind for mark in simulation.marks}.items():
        encoding = simulation.encodings.get(name)
        if encoding is None:  # stays float
            continue
        width = encoding.scheme.bitwidth
        by_width = bits.setdefault(kind.value, {})
        by_width[str(width)] = by_width.get(str(width), 0) + 1
        if kind is Kind.ACTIVATION:
            low = encoding.offset * encoding.scale
            ends = low.min(), (low + encoding.scheme.steps * encoding.scale).max()
            least, most = (float(f"{float(end):.6g}") for end in ends)
            ranges[name] = {"min": least, "max": most, "bitwidth": width}
    return {"ranges": ranges, "bits": bits}
