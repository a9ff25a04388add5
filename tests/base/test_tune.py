"""Scales tuned against the float model: the gradient is autograd's own, codes stay, and what does not help is not kept."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import tiny_model
from qwlora.base.packed import PackedLinear
from qwlora.base.quantize import quantize_
from qwlora.base.storage import load_base
from qwlora.base.tune import TuningSettings, _multiply_, _tunable, tune_scales_
from qwlora.errors import CalibrationError, GridError, RecipeError
from qwlora.grid.fingerprint import fingerprint
from qwlora.grid.scheme import LowPowerBlock, PerBlock, PerChannel, PerTensor, Scheme
from qwlora.pipeline.run import run
from qwlora.recipe import load_recipe

SCHEMES = {
    "tensor": Scheme(4, True, PerTensor()),
    "channel": Scheme(4, True, PerChannel(0)),
    "asymmetric channel": Scheme(3, False, PerChannel(0)),
    "block": Scheme(4, True, PerBlock(8)),
    "asymmetric block": Scheme(2, False, PerBlock(8)),
    "low power": Scheme(4, True, LowPowerBlock(8)),
}


def ids(sequences: int = 48, tokens: int = 32) -> Tensor:
    return torch.randint(0, 250, (sequences, tokens), generator=torch.Generator().manual_seed(0))


def packed(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def divergence(model: nn.Module, reference: nn.Module, batch: Tensor) -> float:
    with torch.no_grad():
        h, g = (m(batch).logits.log_softmax(-1) for m in (model, reference))
    return float(F.kl_div(h, g, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_are_those_of_the_multiplied_weight(name: str) -> None:
    model = nn.Sequential(nn.Linear(32, 24))
    quantize_(model, SCHEMES[name], "rtn")
    layer = model[0]
    assert isinstance(layer, PackedLinear)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with _tunable({"0": layer}) as factors:
        factor = factors["0"]
        with torch.no_grad():
            factor.copy_(torch.linspace(-0.2, 0.3, factor.numel()).view(factor.shape))
        y = model(x)
        y.sin().sum().backward()
    found = x.grad, factor.grad
    x.grad, own = None, factor.detach().clone().requires_grad_()
    values = layer.tensor.dequantize()
    times = (1 + own).repeat_interleave(values.shape[1] // own.shape[1], 1) if own.ndim == 2 else (1 + own).view(-1, 1)
    expected = F.linear(x, values * times, layer.bias)
    expected.sin().sum().backward()
    assert torch.allclose(y, expected, atol=1e-5)
    assert found[0] is not None
    assert found[1] is not None
    assert x.grad is not None
    assert own.grad is not None
    assert torch.allclose(found[0], x.grad, atol=1e-4)
    assert torch.allclose(found[1], own.grad, rtol=1e-3, atol=1e-3)
    _multiply_(layer, 1 + own.detach())
    assert torch.allclose(layer.tensor.dequantize(), (values * times).detach(), rtol=2e-3, atol=1e-6), "what was tuned is what is stored"


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "scheme"), [("llama", "w3-block32"), ("llama", "w3-channel"), ("llama", "w2-block32-asymmetric"), ("gpt2", "w3-block32")]
)
def test_the_model_comes_nearer_and_no_code_moves(architecture: str, scheme: str, compute: str) -> None:
    model = tiny_model(architecture)
    reference = copy.deepcopy(model)
    quantize_(model, scheme)
    before, far = {name: layer.tensor for name, layer in packed(model).items()}, divergence(model, reference, ids()[:42])
    report = tune_scales_(model, reference, ids(), TuningSettings(steps=30, learning_rate=1e-2, compute=compute))
    assert report.kept
    assert report.layers == len(before)
    assert report.after == pytest.approx(divergence(model, reference, ids()[42:]), rel=0.1 if compute == "bfloat16" else 1e-4)
    assert divergence(model, reference, ids()[:42]) < 0.95 * far
    moved = 0
    for name, layer in packed(model).items():
        after = layer.tensor
        assert torch.equal(after.codes, before[name].codes)
        assert torch.equal(after.offset, before[name].offset)
        assert "forward" not in layer.__dict__
        if "block" in scheme:
            assert after.parts.scale.dtype == torch.float16
        moved += int((after.scale != before[name].scale).sum())
    assert moved
    assert not any(p.grad is not None for p in model.parameters())


def test_a_second_run_is_the_same() -> None:
    identities = set()
    for _ in range(2):
        model = tiny_model("llama")
        reference = copy.deepcopy(model)
        quantize_(model, "w3-block32")
        tune_scales_(model, reference, ids(), TuningSettings(steps=5))
        identities.add(fingerprint(model))
    assert len(identities) == 1


def test_scales_that_do_not_help_are_not_kept() -> None:
    model = tiny_model("llama")
    reference = copy.deepcopy(model)
    quantize_(model, "w8-channel")
    identity = fingerprint(model)
    report = tune_scales_(model, reference, ids(), TuningSettings(steps=3, learning_rate=0.5))
    assert not report.kept
    assert report.after >= report.before
    assert fingerprint(model) == identity


def test_long_sequences_are_compared_at_some_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwlora.base.tune._POSITIONS", 8)
    model = tiny_model("llama")
    reference = copy.deepcopy(model)
    quantize_(model, "w3-block32")
    made: list[int] = []
    reference.register_forward_hook(lambda module, args, output: made.append(output.logits.shape[1]))
    assert tune_scales_(model, reference, ids(), TuningSettings(steps=20, learning_rate=1e-2)).kept
    assert set(made) == {8}


def test_padding_is_not_compared() -> None:
    model = tiny_model("llama")
    reference = copy.deepcopy(model)
    quantize_(model, "w3-block32")
    full = {"input_ids": ids()[:1], "attention_mask": torch.ones(1, 32, dtype=torch.int64)}
    padded = {"input_ids": ids()[:1].clone(), "attention_mask": full["attention_mask"].clone()}
    padded["attention_mask"][:, 20:] = 0
    other = {**padded, "input_ids": padded["input_ids"].clone()}
    other["input_ids"][:, 20:] = 7
    found = [tune_scales_(copy.deepcopy(model), reference, [full, batch], TuningSettings(steps=1)).before for batch in (padded, other, full)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] != pytest.approx(found[2], rel=1e-4)


def test_what_cannot_be_tuned_says_why() -> None:
    model = tiny_model("llama")
    reference = copy.deepcopy(model)
    with pytest.raises(GridError, match="no linear layer of the model is packed"):
        tune_scales_(model, reference, ids())
    quantize_(model, "w4-block32")
    with pytest.raises(CalibrationError, match="at least two sequences"):
        tune_scales_(model, reference, ids(1))
    larger = tiny_model("llama")
    larger.resize_token_embeddings(300)
    with pytest.raises(CalibrationError, match=r"the float model's logits are \[1, 32, 300\], the quantized one's"):
        tune_scales_(model, larger, ids())
    for wrong in ({"steps": 0}, {"learning_rate": float("nan")}, {"learning_rate": 1.0}, {"compute": "float16"}):
        with pytest.raises(CalibrationError, match="at least 1 step"):
            TuningSettings(**wrong)  # type: ignore[arg-type]


def test_a_recipe_tunes(recipe_for: Any, tmp_path: Path) -> None:
    def base_of(name: str, *changes: str) -> dict[str, Any]:
        run(load_recipe(recipe_for(), ("base.weights.bitwidth=3", *changes)), tmp_path / name, verbs=("quantize",))
        results: dict[str, Any] = json.loads((tmp_path / name / "results.json").read_text())["base"]
        return results

    plain, tuned = base_of("plain"), base_of("tuned", "base.tuning.steps=12", "base.tuning.learning_rate=0.01")
    assert tuned["tuning"]["kept"]
    assert tuned["tuning"]["after"] < tuned["tuning"]["before"]
    assert plain["fingerprint"] != tuned["fingerprint"]
    assert "tuning" not in plain
    one, two = (packed(load_base(tmp_path / name / "base")) for name in ("plain", "tuned"))
    assert all(torch.equal(one[name].codes, two[name].codes) for name in one)
    assert sorted(p.name for p in (tmp_path / "plain" / "base").iterdir()) == sorted(p.name for p in (tmp_path / "tuned" / "base").iterdir())
    with pytest.raises(RecipeError, match="remove tuning"):
        load_recipe(recipe_for(), ("base={solver: keep, tuning: {steps: 4}}",))
