"""What quantizers cost, where the loss comes from, and mixed precision under a limit."""

from __future__ import annotations

import math

import pytest
import torch

from qwlora import Scheme, SimulationSchemes
from qwlora.errors import CalibrationError
from qwlora.simulation.accounting import account, layer_sqnr
from qwlora.simulation.sensitivity import next_token_loss, sensitivities
from qwlora.simulation.simulation import Simulation
from qwlora.simulation.suggest import suggest
from simulation.captured import batch, simulation

BATCHES = [batch(seed=s) for s in range(2)]
NARROW = Scheme(2, symmetric=False)


def calibrated(bitwidth: int) -> Simulation:
    made = simulation(SimulationSchemes(Scheme(bitwidth, symmetric=False)))
    made.calibrate(BATCHES)
    return made


def loss(made: Simulation) -> float:
    with torch.no_grad():
        return sum(float(next_token_loss(made.primary(b), b)) for b in BATCHES)


def test_costs_are_the_squared_products_of_gradient_and_error() -> None:
    """Against autograd at one value: the input of the graph's last product, whose gradient is that of the loss through the head alone."""
    made = calibrated(4)
    name = "model.norm.mul_1" if "model.norm.mul_1" in made.quantizers else next(n for n in reversed(made.quantizers) if ".norm." in n)
    found = {s.name: s for s in sensitivities(made, BATCHES)}[name]
    quantizer, expected, noise = made.quantizers[name], 0.0, 0.0
    for one in BATCHES:
        kept: list[torch.Tensor] = []
        hook = quantizer.register_forward_hook(lambda *args, kept=kept: kept.append(args[2].detach().requires_grad_()) or kept[0])
        with made.only(), torch.enable_grad():
            value = next_token_loss(made.primary(one), one)
        hook.remove()
        (gradient,) = torch.autograd.grad(value, kept[0])
        assert quantizer.encoding is not None
        error = quantizer.encoding.fake_quantize(kept[0].detach()) - kept[0].detach()
        expected += 0.5 * float((gradient * error).square().sum())
        noise += float(error.square().sum())
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


def test_the_account_goes_from_float_to_the_whole_simulation() -> None:
    made = calibrated(4)
    steps = account(made, lambda: loss(made))
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
    limit = reference + 0.3 * (loss(_all(made, NARROW)) - reference)
    found = suggest(made, BATCHES, lambda: loss(made), limit, NARROW, Scheme(8, symmetric=False))
    assert found.measured <= limit < found.all_narrow
    assert 0 < len(found.wide) < len(made.quantizers)
    assert len(found.wide) + found.narrow == len(made.quantizers)
    assert loss(made) == found.measured, "the simulation is left in the assignment"
    for name, quantizer in made.quantizers.items():
        assert quantizer.scheme.bitwidth == (8 if name in found.wide else 2)
    rules = found.rules(8)
    again = simulation(SimulationSchemes(NARROW, rules=tuple(_rule(r) for r in rules)))
    assert {n for n, q in again.quantizers.items() if q.scheme.bitwidth == 8} == set(found.wide)


def test_a_limit_that_nothing_keeps_is_refused() -> None:
    made = calibrated(8)
    with pytest.raises(CalibrationError, match=r"with every activation at 8 bits the measure is .* above the limit of 0: no mixture keeps it"):
        suggest(made, BATCHES, lambda: loss(made), 0.0, NARROW, Scheme(8, symmetric=False))


def _all(made: Simulation, scheme: Scheme) -> Simulation:
    made.set_scheme("*", scheme)
    made.freeze()
    return made


def _rule(rule: dict[str, object]) -> object:
    from qwlora import PlacementRule

    return PlacementRule(**rule)  # type: ignore[arg-type]
