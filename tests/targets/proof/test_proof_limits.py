"""What a proof allows, and references that prove nothing."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Binomial

from qwlora.data.sequences import IGNORED, Sequences
from qwlora.errors import SourceError
from qwlora.grid.scheme import Scheme
from qwlora.simulation.placement_rules import Schemes
from qwlora.targets.proof.checks import Limits
from qwlora.targets.proof.compare import DECODED
from qwlora.targets.proof.prove import decoded
from qwlora.targets.proof.reference import GRAPHS_NOISE, is_told_apart, least_noise, make_reference
from targets.proofs import measure_logits

IDS = torch.randint(0, 90, (3, 12), generator=torch.Generator().manual_seed(5))
TABLE = 3 * torch.randn(90, 90, generator=torch.Generator().manual_seed(6))


def right(ids: Tensor) -> Tensor:
    """Logits of a model that knows the last token only."""
    return TABLE[ids]


def noisy(size: float) -> Callable[[Tensor], Tensor]:
    """The same with noise of `size`."""
    noise = torch.randn(12, 90, generator=torch.Generator().manual_seed(7))
    return lambda ids: right(ids) + size * noise


def broken(logits: Callable[[Tensor], Tensor], reference: dict[str, Tensor]) -> list[str]:
    return measure_logits(logits, reference).problems


def simulated(noise: float, bitwidth: int = 16) -> dict[str, Tensor]:
    text, states = Sequences(IDS, IDS), {"adapter": right}
    return make_reference(states, text, {"adapter": noisy(noise)}, least_noise=2.0**-bitwidth)


@pytest.mark.parametrize(
    ("noise", "bitwidth", "found", "is_right"),
    [
        (1e-3, 16, 1e-3, True),
        (1e-3, 16, 3e-3, True),
        (1e-3, 16, 2e-2, False),
        (0.0, 16, 2e-2, False),  # no value fell on another step
        (0.0, 8, 2e-2, True),  # a step of 8 bits is as large
    ],
)
def test_log_probabilities_on_grids_may_differ_as_rounding_makes_them(
    noise: float, bitwidth: int, found: float, is_right: bool
) -> None:
    problems = broken(noisy(found), simulated(noise, bitwidth))
    assert any("root mean square" in problem for problem in problems) != is_right


@pytest.mark.parametrize(
    ("schemes", "cached_graphs", "share"),
    [
        (Schemes(), False, 2.0**-16),
        (Schemes(adapter_activation_bitwidth=8), False, 2.0**-8),
        (Schemes(), True, GRAPHS_NOISE),
        (Schemes(Scheme(8)), True, 2.0**-8),
    ],
)
def test_noise_is_no_less_than_what_files_round(
    schemes: Schemes, cached_graphs: bool, share: float
) -> None:
    assert least_noise(schemes, cached_graphs) == share


def of(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda reference: reference.update({name: change(reference[name])})


def only_losses(reference: dict[str, Tensor]) -> None:
    for name in ("top", "log_probs"):
        del reference[f"adapter.{name}"]


@pytest.mark.parametrize(
    "damage",
    [
        of("adapter.largest", lambda t: t * math.nan),
        of("adapter.largest", lambda t: -t),
        of("adapter.log_probs", lambda t: t + math.log(1.5)),
        of("adapter.log_probs", lambda t: t.where(t < -3, torch.tensor(-math.inf))),
        of("adapter.log_probs", lambda t: t[:, :-1]),
        of("adapter.losses", lambda t: t - 20),
        of("adapter.losses", lambda t: t[:1]),
        of("adapter.top", lambda t: t[..., :0]),
        of("adapter.top", lambda t: t - 50),
        of("adapter.top", lambda t: t.float()),
        of("adapter.top", lambda t: t[0, 0, 0]),
        of("adapter.other_same", lambda t: t[:1]),
        of("adapter.other_same", lambda t: t.int()),
        of("adapter.other_losses", lambda t: t.float()),
        of("adapter.noise", lambda t: -t - 1),
        of("adapter.noise", lambda t: t[None]),
        of("ids", lambda t: t[0]),
        of("ids", lambda t: t - 1),
        of("ids", lambda t: t.int()),
        lambda reference: reference.update({n: reference[n] - 90 for n in ("ids", "labels")}),
        of("labels", lambda t: t[:, :5]),
        of("labels", lambda t: t + 1),
        of("labels", lambda t: torch.cat([t[:, :1], torch.full_like(t[:, 1:], IGNORED)], 1)),
        lambda reference: reference.pop("labels"),
        lambda reference: reference.pop("adapter.noise"),
        lambda reference: reference.pop("adapter.other_same"),
        lambda reference: reference.update({"other": torch.ones(1)}),
        lambda reference: reference.update({"base.top": reference["adapter.top"]}),
        lambda reference: reference.clear(),
        only_losses,
    ],
)
def test_a_reference_that_proves_nothing(damage: Callable[[dict[str, Tensor]], Any]) -> None:
    reference = simulated(1e-3)
    assert not broken(right, reference)
    damage(reference)
    with pytest.raises(SourceError, match=r"proves nothing: .*Copy the bundle again"):
        broken(right, reference)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["noise", "other_losses"])
def test_a_floor_that_is_not_finite_limits_nothing(name: str, value: float) -> None:
    reference = simulated(1e-3)
    reference[f"adapter.{name}"] = torch.full_like(reference[f"adapter.{name}"], value)
    assert broken(right, reference)


def test_a_reference_of_another_vocabulary_is_refused() -> None:
    reference = simulated(1e-3)
    with pytest.raises(SourceError, match="a vocabulary of 80 tokens"):
        broken(lambda ids: right(ids)[..., :80], reference)


@pytest.mark.parametrize(("effect", "told_apart"), [(1.0, True), (1e-5, False)])
def test_an_adapter_that_changes_too_little_is_named(effect: float, told_apart: bool) -> None:
    states = {"base": noisy(effect), "adapter": right}
    reference = make_reference(states, Sequences(IDS, IDS))
    assert is_told_apart(reference, Limits()) == told_apart


@pytest.mark.parametrize("floor", [0.999, 0.97, 0.9, 0.6])
def test_tokens_decoded_one_by_one_may_differ_as_chance_has_it(floor: float) -> None:
    chances = Binomial(DECODED, torch.tensor(floor)).log_prob(torch.arange(DECODED + 1.0)).exp()
    for right in range(DECODED + 1):
        is_chance = chances[: right + 1].sum() > 0.025
        passes = right >= 0.9 * DECODED or bool(is_chance)
        assert decoded(right / DECODED, floor).passed == passes
    assert not decoded(math.nan, floor).passed
