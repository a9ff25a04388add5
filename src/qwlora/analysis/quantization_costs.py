"""What quantization costs: how much each part of a simulation and each activation adds to the loss,
and which activations need a wide grid.

`cumulative_costs` measures the parts, one added after the other:

    adapted            only base weights are quantized
    adapter_weights    also lora_A and lora_B
    parameters         also norm weights, biases and everything else that step 1 left float
    activations        also activations: the simulation as it is exported

`suggest` finds the fewest activations on a wide grid that keep a measure within a limit:

    rank       all on the narrow grid, by the cost of `sensitivities`
    promote    the k most costly to the wide grid: the smallest k with `measure() <= limit`, by
               bisection
    demote     groups of promoted activations (same name in any layer) back to the narrow grid where
               the limit still holds, least costly first

Measurements decide; the ranking only orders the search. Bitwidths that a user's rule or an earlier
calibration fixed do not change.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qwlora.errors import CalibrationError
from qwlora.graph.quantized_graph import Kind
from qwlora.grid.encoding import sqnr_db
from qwlora.nn.temporary import gradients_disabled
from qwlora.simulation.fake_quantizer import Quantizer, grid_ends
from qwlora.simulation.placement_rules import PlacementRule
from qwlora.simulation.simulation import Simulation
from qwlora.system.parameter_names import by_glob
from qwlora.system.progress import Track, one_step, untracked


def cumulative_costs(
    simulation: Simulation, measure: Callable[[], float], track: Track = untracked
) -> dict[str, float]:
    """`measure()` after each step above, by name. Steps that quantize nothing are omitted."""
    simulation.encodings  # noqa: B018 (raises if not calibrated)
    names = {kind: [m.name for m in simulation.marks if m.kind is kind] for kind in Kind}
    added = {
        "adapted": [],
        "adapter_weights": names[Kind.ADAPTER],
        "parameters": names[Kind.PARAMETER],
        "activations": names[Kind.ACTIVATION],
    }
    steps = [step for step, quantizers in added.items() if quantizers or step == "adapted"]
    quantized, costs = list[str](), dict[str, float]()
    for step in track(steps, "measuring costs", len(steps)):
        quantized += added[step]
        with simulation.only(*quantized):
            costs[step] = measure()
    return costs


@torch.no_grad()
def layer_sqnr(
    simulation: Simulation, batches: Collection[Mapping[str, Any]], track: Track = untracked
) -> dict[str, float]:
    """`10 log10 (sum x^2 / sum (x_hat - x)^2)` of each quantized activation, in dB.

    x is from the float graph, x_hat from the simulation, with the errors of earlier layers. All
    activations of a batch are in memory twice.
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
    for mark, encoding in zip(simulation.marks, simulation.encodings.values(), strict=True):
        width = encoding.scheme.bitwidth
        by_width = bits.setdefault(mark.kind.value, {})
        by_width[str(width)] = by_width.get(str(width), 0) + 1
        if mark.kind is Kind.ACTIVATION:
            least, most = (float(f"{end:.6g}") for end in grid_ends(encoding))
            ranges[mark.name] = {"min": least, "max": most, "bitwidth": width}
    return {"ranges": ranges, "bits": bits}


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of one quantizer."""

    name: str
    bitwidth: int  # of its encoding
    cost: float  # estimated increase of the loss, summed over all batches
    sqnr_db: float  # `10 log10 (sum x^2 / sum e^2)`, on the values of the float graph


def sensitivities(
    simulation: Simulation, batches: Collection[Mapping[str, Any]], track: Track = untracked
) -> list[Sensitivity]:
    """The activation quantizers of a calibrated simulation, most costly first, by one forward and
    backward pass per batch.

        cost = 1/2 sum (g e)^2,     e = x_hat - x,     g = dL/dx,     L: `next_token_loss`

    summed over the values x of the activation. This is the second-order term of the loss, with the
    diagonal of the empirical Fisher information instead of the Hessian. Costs are taken at the
    float graph and ignore how errors add up: use them to rank, and measure the result (`suggest`).

    Source: Dong et al. 2019 (HAWQ, https://arxiv.org/abs/1905.03696), with Fisher information as in
    Li et al. 2021 (BRECQ, https://arxiv.org/abs/2102.05426).

    Args:
        batches: the model's arguments; keep them short, all activations are in memory at once.
    """
    simulation.encodings  # noqa: B018 (raises if not calibrated)
    cost, signal, noise = (dict.fromkeys(simulation.quantizers, 0.0) for _ in range(3))
    leaves: list[Tensor] = []

    def add_cost_node(quantizer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert isinstance(quantizer, Quantizer)
        if not output.requires_grad:
            output = output.detach().requires_grad_()
            leaves.append(output)
        x, encoding, name = output.detach().clone(), quantizer.known_encoding(), quantizer.name

        def add_cost(gradient: Tensor) -> None:
            error = encoding.fake_quantize(x) - x
            noise[name] += float(error.square().sum())
            signal[name] += float(x.square().sum())
            # no first-order term: rounding errors have no preferred direction
            cost[name] += 0.5 * float((error * gradient).square().sum())

        output.register_hook(add_cost)
        # a clone, since later operators may overwrite it
        return output.clone()

    with ExitStack() as stack:
        for quantizer in simulation.quantizers.values():
            stack.callback(quantizer.register_forward_hook(add_cost_node).remove)
        # Otherwise gradients of parameters make values require gradients before their hook.
        stack.enter_context(gradients_disabled(simulation))
        stack.enter_context(simulation.only())
        for batch in track(batches, "measuring sensitivity", len(batches)):
            with torch.enable_grad():
                value = next_token_loss(simulation.primary(batch), batch)
            torch.autograd.backward(value, inputs=leaves)
            leaves.clear()
    ranking = [
        Sensitivity(name, q.scheme.bitwidth, cost[name], sqnr_db(signal[name], noise[name]))
        for name, q in simulation.quantizers.items()
    ]
    return sorted(ranking, key=lambda s: -s.cost)


def next_token_loss(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Summed cross-entropy of all attended tokens but the first of each sequence, in nats."""
    targets = batch["input_ids"][:, 1:]
    if (mask := batch.get("attention_mask")) is not None:
        targets = targets.masked_fill(mask[:, 1:] == 0, -100)
    targets = targets.flatten().to(logits.device)
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum"
    )


@dataclass(frozen=True)
class Suggestion:
    """The result of a search, which the simulation has afterwards. The rules create it in a
    simulation with narrow activations; append them to its other rules."""

    wide: tuple[str, ...]  # names of the activations on the wide grid, in graph order
    narrow: int  # number of activations on the narrow grid
    kept: int  # number of activations that were not searched
    rules: tuple[PlacementRule, ...]
    measured: float  # the measure of the assignment
    all_narrow: float
    all_wide: float


def suggest(
    simulation: Simulation,
    batches: Collection[Mapping[str, Any]],
    measure: Callable[[], float],
    limit: float,
    narrow: int = 8,
    wide: int = 16,
    track: Track = untracked,
) -> Suggestion:
    """Search for an assignment of bitwidths and apply it to a calibrated simulation.

    Args:
        batches: see `sensitivities`.
        measure: what to keep within `limit`, smaller is better; for example the simulation's
            perplexity. It is called several dozen times.
        narrow, wide: bitwidths.
    """
    ruled = {mark.name for mark in simulation.marks if mark.rule is not None}
    searched = [n for n, q in simulation.quantizers.items() if not q.fixed and n not in ruled]
    measures: dict[frozenset[str], float] = {}

    def measured(names: Sequence[str]) -> float:
        """The measure with `names` on the wide grid and the rest on the narrow one."""
        chosen = frozenset(names)
        for name in searched:
            quantizer = simulation.quantizers[name]
            scheme = replace(quantizer.scheme, bitwidth=wide if name in chosen else narrow)
            # Setting a scheme drops the encoding.
            if quantizer.scheme != scheme:
                quantizer.scheme = scheme
        simulation.freeze()
        if chosen not in measures:
            measures[chosen] = measure()
        return measures[chosen]

    all_wide = measured(searched)
    if not all_wide <= limit:
        raise CalibrationError(
            f"with every activation at {wide} bits the measure is {all_wide:.5g}, above the limit "
            f"of {limit:.5g}. Raise the limit, or keep the most costly activations float "
            "(simulation.rules with keep: float)"
        )
    all_narrow = measured([])
    ranking = [s.name for s in sensitivities(simulation, batches, track) if s.name in searched]
    # Bisection assumes that the measure falls with the count, so the result satisfies the limit but
    # may not be the smallest.
    with one_step(track, "promoting"):
        enough = bisect_left(
            range(len(ranking)), True, key=lambda count: measured(ranking[:count]) <= limit
        )
    wide_names = promoted = ranking[:enough]
    groups = list(by_glob(promoted).values())
    groups.sort(key=lambda names: -min(map(promoted.index, names)))
    for group in track(groups, "demoting", len(groups)):
        fewer = [name for name in wide_names if name not in group]
        if measured(fewer) <= limit:
            wide_names = fewer
    # The last group that was tried may have failed: this gives the simulation the result back.
    result = measured(wide_names)
    values = {v.name: v.names for v in simulation.placement.values if v.name in searched}
    return Suggestion(
        tuple(name for name in searched if name in wide_names),
        len(searched) - len(wide_names),
        len(simulation.quantizers) - len(searched),
        rules_for(wide_names, values, narrow, wide),
        result,
        all_narrow,
        all_wide,
    )


def rules_for(
    chosen: Collection[str], names: Mapping[str, tuple[str, ...]], narrow: int, wide: int
) -> tuple[PlacementRule, ...]:
    """Rules that make `chosen` wide and everything else narrow. `names` are those that a glob
    matches, by value. One glob covers a value of all layers where it matches no other value."""
    exceptions: dict[str, PlacementRule] = {}
    rules = []
    for kind, members in by_glob(names).items():
        among = [name for name in members if name in chosen]
        everywhere = PlacementRule(kind, bitwidth=wide)
        narrow_names = (fitting for name, fitting in names.items() if name not in chosen)
        if len(among) == len(members) and not any(map(everywhere.fits, narrow_names)):
            rules.append(everywhere)
            continue
        for rule in (PlacementRule(name, bitwidth=wide) for name in among):
            rules.append(rule)
            exceptions |= {
                name: PlacementRule(name, bitwidth=narrow)
                for name, fitting in names.items()
                if name not in chosen and rule.fits(fitting)
            }
    # The name of the first value of a module and operator (`model.layers.0.mlp.mul`) also matches
    # the next (`mul_1`), so exceptions for narrow ones come first.
    return (*exceptions.values(), *rules)
