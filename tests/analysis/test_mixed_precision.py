"""What quantizers cost, where the loss comes from, and mixed precision under a limit."""

import math
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import pytest
import torch

from conftest import packed_model
from qwlora import PlacementRule, Scheme, Schemes, simulate
from qwlora.analysis.quantization_costs import (
    cumulative_costs,
    layer_sqnr,
    next_token_loss,
    rules_for,
    sensitivities,
    suggest,
)
from qwlora.errors import CalibrationError
from qwlora.simulation.simulation import Simulation
from simulation.captured import batch, simulation

BATCHES = [batch(seed=s) for s in range(2)]
NARROW = Scheme(2, symmetric=False)


def calibrated(bitwidth: int) -> Simulation:
    made = simulation(Schemes(Scheme(bitwidth, symmetric=False)))
    made.calibrate(BATCHES)
    return made


def loss(made: Simulation) -> float:
    with torch.no_grad():
        return sum(float(next_token_loss(made.primary(b), b)) for b in BATCHES)


def test_costs_are_the_squared_products_of_gradient_and_error() -> None:
    """Against autograd at one value: the input of the graph's last product."""
    made = calibrated(4)
    name = next(n for n in reversed(made.quantizers) if ".norm." in n)
    found = {s.name: s for s in sensitivities(made, BATCHES)}[name]
    quantizer, expected = made.quantizers[name], 0.0
    for one in BATCHES:
        kept: list[torch.Tensor] = []

        def keep(module: Any, args: Any, output: torch.Tensor, kept: Any = kept) -> torch.Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[0]

        hook = quantizer.register_forward_hook(keep)
        with made.only(), torch.enable_grad():
            value = next_token_loss(made.primary(one), one)
        hook.remove()
        (gradient,) = torch.autograd.grad(value, kept[0])
        assert quantizer.encoding is not None
        error = quantizer.encoding.fake_quantize(kept[0].detach()) - kept[0].detach()
        expected += 0.5 * float((gradient * error).square().sum())
    assert found.cost == pytest.approx(expected, rel=1e-4)
    assert found.cost > 0
    assert found.bitwidth == 4


def test_costs_fall_with_the_bitwidth_and_leave_the_simulation_as_it_was() -> None:
    made = calibrated(4)
    before, trainable = loss(made), {p for p in made.parameters() if p.grad is not None}
    costs = {s.name: s.cost for s in sensitivities(made, BATCHES)}
    assert loss(made) == before
    assert {p for p in made.parameters() if p.grad is not None} == trainable
    finer = {s.name: s.cost for s in sensitivities(calibrated(8), BATCHES)}
    assert sum(finer.values()) < 0.05 * sum(costs.values())
    assert list(costs.values()) == sorted(costs.values(), reverse=True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_costs_do_not_depend_on_what_may_be_trained(architecture: str) -> None:
    model = packed_model(architecture, layers=1)
    made = simulate(model, BATCHES[0], Schemes(Scheme(4, symmetric=False)))
    made.calibrate(BATCHES)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    found = {s.name: s.cost for s in sensitivities(made, BATCHES[:1])}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    model.requires_grad_(False)
    assert found == {s.name: s.cost for s in sensitivities(made, BATCHES[:1])}
    assert sum(cost > 0 for cost in found.values()) > 0.8 * len(found)


def test_the_account_goes_from_float_to_the_whole_simulation() -> None:
    made = calibrated(4)
    steps = cumulative_costs(made, lambda: loss(made))
    assert list(steps) == ["adapted", "adapter_weights", "parameters", "activations"]
    assert steps["activations"] == loss(made)
    with made.only():
        assert steps["adapted"] == loss(made)
    assert len(set(steps.values())) == 4


def test_layers_are_compared_with_the_float_graph() -> None:
    coarse, fine = (layer_sqnr(calibrated(bits), BATCHES) for bits in (4, 8))
    assert coarse.keys() == fine.keys()
    finite = [name for name in coarse if math.isfinite(coarse[name])]
    assert sum(fine[name] > coarse[name] + 10 for name in finite) > 0.9 * len(finite)


def test_the_fewest_dearest_values_get_the_wide_grid() -> None:
    made = calibrated(8)
    with made.only():
        reference = loss(made)
    limit = reference + 0.3 * (loss(calibrated(2)) - reference)
    found = suggest(made, BATCHES, lambda: loss(made), limit, 2, 8)
    assert found.measured <= limit < found.all_narrow
    assert 0 < len(found.wide) < len(made.quantizers)
    assert len(found.wide) + found.narrow == len(made.quantizers)
    assert loss(made) == found.measured, "the simulation is left in the assignment"
    for name, quantizer in made.quantizers.items():
        assert quantizer.scheme.bitwidth == (8 if name in found.wide else 2)
    again = simulation(Schemes(NARROW, rules=found.rules))
    assert {n for n, q in again.quantizers.items() if q.scheme.bitwidth == 8} == set(found.wide)


def test_what_a_rule_decided_is_not_searched() -> None:
    """Nor is the sign of a grid changed."""
    own = (
        PlacementRule("*.q_proj.linear", bitwidth=4, minimum=-3.0),
        PlacementRule("*.v_proj.linear", symmetric=True),
    )
    schemes = Schemes(NARROW, rules=own, symmetric_matmul_second_input=True)
    made = simulation(schemes)
    made.calibrate(BATCHES)
    before = {name: q.scheme for name, q in made.quantizers.items()}
    ruled = {name for name in before if name.endswith((".q_proj.linear", ".v_proj.linear"))}
    found = suggest(made, BATCHES, lambda: loss(made), 1.2 * loss(made), 2, 8)
    assert len(found.wide) + found.narrow == len(before) - len(ruled)
    assert not ruled & set(found.wide)
    after = {name: q.scheme for name, q in made.quantizers.items()}
    assert all(after[name] == before[name] for name in ruled)
    assert [s.symmetric for s in after.values()] == [s.symmetric for s in before.values()]
    again = simulation(replace(schemes, rules=(*own, *found.rules)))
    assert {name: q.scheme for name, q in again.quantizers.items()} == after


def test_rules_are_exact_where_names_fit_their_neighbours() -> None:
    """`m.mul` is the name of one value and fits all products of `m`; and a glob's star passes dots."""
    ends = ("mlp.mul", "mlp.mul_1", "mul")
    values = [f"model.layers.{layer}.{value}" for value in ends for layer in (0, 1)]
    names = {value: (value, value.rpartition(".")[0], value.removesuffix("_1")) for value in values}
    for chosen in chain.from_iterable(combinations(values, n) for n in range(len(values) + 1)):
        rules = rules_for(chosen, names, 8, 16)
        given = {
            value: next((rule.bitwidth for rule in rules if rule.fits(fitting)), 8)
            for value, fitting in names.items()
        }
        assert given == {value: 16 if value in chosen else 8 for value in values}, chosen
    globs = [rule.match for rule in rules_for(values, names, 8, 16)]
    assert globs == [f"model.layers.*.{value}" for value in ends]


def test_a_limit_that_nothing_keeps_is_refused() -> None:
    made, message = calibrated(8), r"activation at 8 bits the measure is .* above the limit of 0"
    with pytest.raises(CalibrationError, match=message):
        suggest(made, BATCHES, lambda: loss(made), 0.0, 2, 8)
