"""GPTQ against its definition and against rounding to nearest; the refinement; statistics of inputs."""

import pytest
import torch
from torch import Tensor

from qwlora.errors import CalibrationError, GridError
from qwlora.grid.encoding import Encoding, measure
from qwlora.grid.scheme import PerChannel, Scheme, parse_scheme
from qwlora.quantize.gptq import GptqSettings, solve_gptq
from qwlora.quantize.scale_search import search_scale, storable_scale

SCHEMES = ["w4-channel", "w4-tensor", "w4-block32", "w3-block64", "w2-block32-asymmetric"]
SCHEMES += ["w4-lpbq64", "w8-channel-asymmetric", "w4-signed32", "w2-signed64"]


def problem(out: int = 48, columns: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    mixing *= torch.logspace(0, -2, columns).unsqueeze(1)
    x = torch.randn(1000, columns, generator=generator) @ mixing
    return torch.randn(out, columns, generator=generator) * 0.02, x.T @ x / len(x)


def solved(weight: Tensor, name: str, moment: Tensor) -> Encoding:
    return solve_gptq(weight, parse_scheme(name), moment)[0].encoding


def output_error(difference: Tensor, moment: Tensor) -> float:
    return float(((difference @ moment) * difference).sum())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("order", [False, True])
def test_the_error_falls_from_rounding_to_gptq_to_its_refinement(name: str, order: bool) -> None:
    weight, moment = problem()
    scheme = parse_scheme(name)
    rounded = output_error(weight - measure(weight, scheme).fake_quantize(weight), moment)
    plain, _ = solve_gptq(weight, scheme, moment, GptqSettings(sweeps=0, activation_order=order))
    refined, _ = solve_gptq(weight, scheme, moment, GptqSettings(activation_order=order))
    errors = [output_error(weight - q.dequantize(), moment) for q in (plain, refined)]
    assert errors[1] < errors[0] < 0.7 * rounded
    assert int(refined.codes.max()) <= scheme.steps


def test_without_refinement_it_is_the_recursion_of_the_paper() -> None:
    """The inverse Hessian updated by elimination, in float64; no Cholesky factor, no runs."""
    weight, moment = problem(out=8, columns=48)
    scheme = parse_scheme("w4-channel")
    found, report = solve_gptq(weight, scheme, moment, GptqSettings(sweeps=0))
    hessian = moment.double()
    hessian.diagonal().add_(report["damping"] * float(moment.diagonal().mean()))
    inverse, left = hessian.inverse(), weight.double().clone()
    scale = found.encoding.scale.double()
    expected = torch.empty_like(left)
    for i in range(48):
        expected[:, i] = torch.round(left[:, i] / scale).clamp(-8, 7) * scale
        left -= torch.outer((left[:, i] - expected[:, i]) / inverse[i, i], inverse[i])
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, :] = inverse[:, i] = 0
        inverse[i, i] = 1
    assert (found.dequantize() - expected).abs().max() < 1e-6


def test_independent_inputs_leave_nothing_to_make_good() -> None:
    weight, _ = problem()
    scheme = parse_scheme("w4-block32")
    found, _ = solve_gptq(weight, scheme, torch.eye(128), GptqSettings(sweeps=0))
    expected = search_scale(weight, scheme, coarse=True)
    assert torch.equal(found.codes, expected.quantize(weight))


def test_columns_that_no_input_reaches_are_rounded_to_nearest() -> None:
    weight, moment = problem()
    dead = torch.arange(0, 128, 3)
    moment[dead] = 0
    moment[:, dead] = 0
    found, _ = solve_gptq(weight, parse_scheme("w4-channel"), moment)
    assert torch.equal(found.codes[:, dead], found.encoding.quantize(weight)[:, dead])


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_moment_of_few_tokens_is_damped_until_it_can_be_factored(tokens: int) -> None:
    weight, _ = problem()
    x = 1e4 * torch.randn(tokens, 128, generator=torch.Generator().manual_seed(1))
    moment = x.T @ x / tokens
    found, report = solve_gptq(weight, parse_scheme("w4-channel"), moment)
    assert report["damping"] >= 0.01
    rounded = measure(weight, parse_scheme("w4-channel")).fake_quantize(weight)
    errors = [output_error(weight - w, moment) for w in (found.dequantize(), rounded)]
    assert errors[0] < errors[1]
    settings = GptqSettings(damping=0.0)
    _, report = solve_gptq(weight, parse_scheme("w4-channel"), moment / 1e8, settings)
    assert 0 < report["damping"] < 0.01


def test_impossible_settings_and_wrong_input_are_refused() -> None:
    for key in ("damping", "sweeps"):
        with pytest.raises(GridError, match=f"{key} .*-1.*at least 0"):
            GptqSettings(**{key: -1})
    weight, moment = problem()
    for scheme, factor, message in (
        (Scheme(4, granularity=PerChannel(1)), 1.0, "gptq needs scales per output"),
        (parse_scheme("w4-block48"), 1.0, "blocks of 48 do not divide"),
        (parse_scheme("w4-channel"), float("nan"), "nan or infinity"),
    ):
        with pytest.raises((GridError, CalibrationError), match=message):
            solve_gptq(weight, scheme, moment * factor)


@pytest.mark.parametrize("name", [n for n in SCHEMES if "lpbq" not in n])  # found from free scales
def test_fit_is_never_worse_than_the_min_max_range(name: str) -> None:
    weight, moment = problem()
    scheme, importance = parse_scheme(name), moment.diagonal()
    errors = [
        float(((e.fake_quantize(weight) - weight).square() * importance).sum())
        for e in (search_scale(weight, scheme, importance), measure(weight, scheme))
    ]
    assert errors[0] <= errors[1] * 1.001


@pytest.mark.parametrize("name", ["w4-block32", "w4-signed32"])
def test_block_scales_survive_float16(name: str) -> None:
    weight, moment = problem()
    for grid in (search_scale(weight, parse_scheme(name)), solved(weight, name, moment)):
        assert torch.equal(grid.scale, grid.scale.half().float())
        assert bool((grid.scale < 0).any()) == ("signed" in name)
    for sign in (1, -1):  # float16 would round them badly
        tiny = torch.tensor([1e-7, 1e6]) * sign
        assert torch.equal(storable_scale(tiny), tiny)


def test_the_search_finds_a_narrow_range() -> None:
    """One outlier among many values: a tenth of the min-max range is best for one grid of all."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    weight[0, 0] = 40.0
    found = float(search_scale(weight, Scheme(4)).scale)
    assert found == pytest.approx(float(search_scale(weight[1:], Scheme(4)).scale), rel=0.15)
    assert found < 0.2 * 40 / 7
