"""Initializations of an adapter are optimal, and do not change the base."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from conftest import tiny_model
from qwlora.adapter.initialize import Measure, initialize_, solver_difference
from qwlora.errors import TrainingError
from qwlora.grid.encoding import QuantizedTensor, measure
from qwlora.grid.scheme import PerBlock, Scheme
from qwlora.grid.second_moments import LayerMoments
from qwlora.nn import pack_module, weight_out_in
from qwlora.nn.fingerprint import fingerprint
from qwlora.quantize.quantize_blocks import observe_moments
from qwlora.quantize.quantize_model import quantize_
from qwlora.quantize.tune_scales import TuningSettings, tune_
from qwlora.quantize.tuned_parameters import Tunable


def weights_of(reference: torch.nn.Module) -> Callable[[str], Tensor]:
    return lambda path: weight_out_in(reference.get_submodule(path)).detach()


def lora_layers(model: torch.nn.Module) -> dict[str, Any]:
    prefix = "base_model.model."
    modules = model.named_modules()
    return {n.removeprefix(prefix): m for n, m in modules if isinstance(m, LoraLayer)}


def product(layer: Any) -> Tensor:
    """B A."""
    return (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()


def correlated(columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator)
    return x.T @ x / len(x)


@pytest.mark.parametrize(("out", "columns"), [(24, 40), (40, 24), (24, 24)])
def test_correction_is_optimal_for_its_rank(out: int, columns: int) -> None:
    """The Eckart-Young bound, with symmetric roots where the code uses Cholesky factors."""
    difference = torch.randn(out, columns, generator=torch.Generator().manual_seed(0))
    b, a, found = Measure(None).best_correction(difference, 5)
    singular = torch.linalg.svdvals(difference)
    left, bound = (x.square().sum() for x in (difference - b @ a, singular[5:]))
    torch.testing.assert_close(left, bound, rtol=1e-3, atol=0)
    torch.testing.assert_close(found, singular[:5], rtol=1e-3, atol=0)

    moment = LayerMoments(correlated(columns), correlated(out))
    b, a, found = Measure(moment).best_correction(difference, 5)
    r, g = damped(moment.input, 0.1), damped(moment.output, 1.0)
    cost = float((g @ difference @ r * difference).sum())
    assert Measure(moment).of(difference) == pytest.approx(cost, rel=1e-4)
    singular = torch.linalg.svdvals(root(g) @ difference @ root(r))
    left = difference - b @ a
    bound = singular[5:].square().sum()
    torch.testing.assert_close((g @ left @ r * left).sum(), bound, rtol=1e-3, atol=0)
    torch.testing.assert_close(found, singular[:5], rtol=1e-3, atol=0)
    as_long = min(1.0, out / float(r.trace())) ** 0.5
    torch.testing.assert_close(b.norm(dim=0), as_long * (a @ torch.linalg.cholesky(r)).norm(dim=1))


def damped(matrix: Tensor, share: float) -> Tensor:
    return matrix + share * matrix.diagonal().mean() * torch.eye(len(matrix))


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.T


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_outputs_get_closer_to_the_float_model(architecture: str) -> None:
    model = tiny_model(architecture)
    reference = copy.deepcopy(model)
    ids = torch.randint(0, 250, (8, 32), generator=torch.Generator().manual_seed(0))
    quantize_(model, "w2-block32-asymmetric", "gptq", calibration=ids)
    identity = fingerprint(model)

    def distance(candidate: torch.nn.Module) -> float:
        with torch.no_grad():
            return float((candidate(ids).logits - reference(ids).logits).square().mean())

    base, found = distance(model), {}
    for init in ("svd", "qera"):
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(copy.deepcopy(model), config)
        reports = initialize_(adapted, init, weights_of(reference), observe_moments(model, ids))
        assert all(report.after < report.before for report in reports.values())
        assert fingerprint(adapted) == identity
        found[init] = distance(adapted)
    assert found["qera"] < base
    assert found["qera"] < found["svd"]


@pytest.mark.parametrize("nothing", ["difference", "gradient", "no more"])
def test_factors_are_finite_when_there_is_nothing_to_correct(nothing: str) -> None:
    difference = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    difference *= nothing != "difference"
    moments = LayerMoments(correlated(8), correlated(6) * (nothing != "gradient"))
    rank = 10 if nothing == "no more" else 3
    b, a, found = Measure(moments).best_correction(difference, rank)
    assert all(bool(torch.as_tensor(x).isfinite().all()) for x in (b, a, found))
    if nothing == "difference":
        assert not (b @ a).any()
    elif nothing == "no more":  # the rank is above that of the matrix
        assert (b.shape, a.shape) == ((6, 6), (6, 8))
        assert torch.allclose(b @ a, difference, atol=1e-4)
    with pytest.raises(TrainingError, match="the moments contain nan or infinity"):
        Measure(LayerMoments(torch.full((8, 8), float("nan"))))


def test_ranks_that_correct_nothing_are_trainable() -> None:
    model = tiny_model("llama")
    quantize_(model, "w4-block32", "rtn")
    adapted = get_peft_model(model, LoraConfig(r=80, target_modules=["q_proj"]))
    layers = lora_layers(adapted)
    layer = next(iter(layers.values()))
    own = layer.lora_A["default"].weight.detach().clone()
    initialize_(adapted, "svd", weights_of(tiny_model("llama")), share=1)
    after = layer.lora_A["default"].weight
    assert torch.equal(after[64:], own[64:])
    assert not torch.equal(after[:64], own[:64])
    initialize_(adapted, "svd", lambda path: layers[path].get_base_layer().tensor.dequantize())
    assert not layer.lora_B["default"].weight.any(), "nothing was lost, so nothing is corrected"
    assert layer.lora_A["default"].weight.abs().sum(1).min() > 0


@pytest.mark.parametrize(("share", "ranks"), [(0.5, 3), (0.01, 1), (1.0, 5)])
def test_ranks_beyond_the_share_keep_pefts_default(share: float, ranks: int) -> None:
    model = tiny_model("llama")
    reference = copy.deepcopy(model)
    quantize_(model, "w3-block32", "rtn")
    config = LoraConfig(r=5, lora_alpha=15, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(model, config)
    layers = lora_layers(adapted)
    own = {name: layer.lora_A["default"].weight.detach().clone() for name, layer in layers.items()}
    reports = initialize_(adapted, "svd", weights_of(reference), share=share)
    assert layers
    for path, layer in layers.items():
        assert torch.equal(layer.lora_A["default"].weight[ranks:], own[path][ranks:])
        assert not layer.lora_B["default"].weight[:, ranks:].any()
        weight = weights_of(reference)(path)
        difference = weight - layer.get_base_layer().tensor.dequantize()
        left = difference - 3 * product(layer)
        bound = torch.linalg.svdvals(difference)[ranks:].square().sum()
        assert float(left.square().sum()) == pytest.approx(float(bound), rel=1e-3)
        assert reports[path].after == pytest.approx(float(bound / weight.square().sum()), rel=1e-3)


@pytest.mark.parametrize(
    "scheme",
    ["w3-block32", "w2-block32-asymmetric", "w3-channel", "w3-tensor", "w4-lpbq32", "w3-signed32"],
)
def test_tuned_scales_are_not_corrected(scheme: str) -> None:
    model = tiny_model("llama", layers=1)
    reference = copy.deepcopy(model)
    quantize_(model, scheme)
    ids = torch.randint(0, 250, (24, 32), generator=torch.Generator().manual_seed(0))

    def started(base: torch.nn.Module, scales: dict[str, Tensor] | None) -> dict[str, Tensor]:
        adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        initialize_(adapted, "svd", weights_of(reference), solver_scales=scales)
        return {path: product(layer) for path, layer in lora_layers(adapted).items()}

    solved = started(copy.deepcopy(model), None)
    settings = TuningSettings(steps=10, learning_rate=0.02, compute="float32")
    report = tune_(model, reference, ids, settings)
    assert report.kept
    adapted = started(copy.deepcopy(model), report.solver_scales)
    unaware = started(copy.deepcopy(model), None)
    for path, correction in solved.items():
        assert torch.equal(adapted[path], correction)
        near = 2e-3 * float(correction.abs().max())
        assert not torch.allclose(unaware[path], correction, rtol=0, atol=near)
    name = next(iter(report.solver_scales))
    message = rf"{name}: the scale before tuning has shape \[3\].* scales of this base"
    with pytest.raises(TrainingError, match=message):
        started(copy.deepcopy(model), report.solver_scales | {name: torch.ones(3)})


def test_float_offset_is_the_solvers_too() -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)) + 3
    encoding = measure(weight, Scheme(4, False, PerBlock(8), float_offset=True))
    tensor = QuantizedTensor(encoding.quantize(weight), encoding)
    model = torch.nn.Sequential(pack_module(torch.nn.Linear(weight.shape[1], 24), tensor))
    solved, before = model[0].tensor.dequantize(), model[0].tensor.parts.scale
    tuned = Tunable(model)
    with torch.no_grad():
        tuned.factors["0"].copy_(torch.linspace(-0.2, 0.3, 24 * 4).view(24, 4))
    tuned.multiply_()
    layer = get_peft_model(model, LoraConfig(r=2, target_modules=["0"])).base_model.model[0]
    found, unaware = (solver_difference("0", layer, weight, s) for s in ({"0": before}, {}))
    torch.testing.assert_close(found, weight - solved, rtol=0, atol=2e-6)
    assert float((unaware - (weight - solved)).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("init", "scheme", "share", "options", "message"),
    [
        ("svd", None, 0.5, {}, "no layer with adapter 'default' is quantized"),
        ("qera", "w4-block32", 0.5, {}, r"no moments of model\.layers\.0\.self_attn\.q_proj"),
        ("svd", "w4-block32", 0.5, {"use_dora": True}, "DoRA"),
        ("svd", "w4-block32", 0.0, {}, r"in \(0, 1\], not 0"),
        ("svd", "w4-block32", 1.5, {}, r"in \(0, 1\], not 1.5"),
        ("svd", "w4-block32", float("nan"), {}, r"in \(0, 1\], not nan"),
    ],
)
def test_errors_name_the_reason(
    init: Any, scheme: str | None, share: float, options: dict[str, Any], message: str
) -> None:
    model = tiny_model("llama")
    if scheme:
        quantize_(model, scheme, "rtn")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options))
    with pytest.raises(TrainingError, match=message):
        initialize_(adapted, init, lambda path: torch.empty(0), share=share)
