"""What quantization does to a simulation: how much each part and each activation adds to the loss,
and how far activations are off.

adapted            only base weights are quantized
adapter_weights    also lora_A and lora_B
parameters         also norm weights, biases and everything else that step 1 left float
activations        also activations: the simulation as it is exported
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwlora.graph.quantized_graph import Kind
from qwlora.grid.encoding import sqnr_db
from qwlora.nn.temporary import gradients_disabled
from qwlora.simulation.fake_quantizer import Quantizer
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


Loss = Callable[[Tensor, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of one quantizer."""

    name: str
    bitwidth: int  # of its encoding
    cost: float  # estimated increase of the loss, summed over all batches
    sqnr_db: float  # `10 log10 (sum x^2 / sum e^2)`, on the values of the float graph


@dataclass
class _Sums:
    cost: float = 0.0
    signal: float = 0.0
    noise: float = 0.0


def sensitivities(
    simulation: Simulation,
    batches: Collection[Mapping[str, Any]],
    loss: Loss | None = None,
    track: Track = untracked,
) -> list[Sensitivity]:
    """The activation quantizers of a calibrated simulation, most costly first, by one forward and
    backward pass per batch.

        cost = 1/2 sum (g e)^2,     e = x_hat - x,     g = dL/dx

    summed over the values x of the activation. This is the second-order term of the loss, with the
    diagonal of the empirical Fisher information instead of the Hessian; the first-order term is
    omitted because rounding errors have no preferred direction. Costs are taken at the float graph
    and ignore how errors add up: use them to rank, and measure the result (`mixed_precision.py`).

    Source: Dong et al. 2019 (HAWQ, https://arxiv.org/abs/1905.03696), with Fisher information as in
    Li et al. 2021 (BRECQ, https://arxiv.org/abs/2102.05426).

    Args:
        batches: the model's arguments; keep them short, all activations are in memory at once.
        loss: maps primary output and batch to a scalar. Default: `next_token_loss`.
    """
    simulation.encodings  # noqa: B018 (raises if not calibrated)
    sums = {name: _Sums() for name in simulation.quantizers}
    leaves: list[Tensor] = []

    def add_cost_node(quantizer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert isinstance(quantizer, Quantizer)
        if not output.requires_grad:
            output = output.detach().requires_grad_()
            leaves.append(output)
        x, encoding, of_value = output.detach().clone(), quantizer.encoding, sums[quantizer.name]
        assert encoding is not None

        def add_cost(gradient: Tensor) -> None:
            error = encoding.fake_quantize(x) - x
            of_value.noise += float(error.square().sum())
            of_value.signal += float(x.square().sum())
            of_value.cost += 0.5 * float((error * gradient).square().sum())

        output.register_hook(add_cost)
        return output.clone()  # later operators may overwrite it

    with ExitStack() as stack:
        for quantizer in simulation.quantizers.values():
            stack.callback(quantizer.register_forward_hook(add_cost_node).remove)
        # without it, gradients of parameters would make values require gradients before their hook
        stack.enter_context(gradients_disabled(simulation))
        stack.enter_context(simulation.only())
        for batch in track(batches, "measuring sensitivity", len(batches)):
            with torch.enable_grad():
                value = (loss or next_token_loss)(simulation.primary(batch), batch)
            torch.autograd.backward(value, inputs=leaves)
            leaves.clear()
    ranking = [
        Sensitivity(
            name, q.scheme.bitwidth, sums[name].cost, sqnr_db(sums[name].signal, sums[name].noise)
        )
        for name, q in simulation.quantizers.items()
    ]
    return sorted(ranking, key=lambda s: -s.cost)


def next_token_loss(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Summed cross-entropy of all attended tokens but the first of each sequence, in nats."""
    targets = batch["input_ids"][:, 1:]
    if (mask := batch.get("attention_mask")) is not None:
        targets = targets.masked_fill(mask[:, 1:] == 0, -100)
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
