"""What `qwlora plan` says before a job runs: counted from shapes, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from adapter.small_models import mixture
from cli.command_line import answered, qwlora, refused
from conftest import byte_tokenizer, tiny_model
from qwlora.adapter.attach import LoraShape, attach
from qwlora.pipeline.plan import forecast
from qwlora.pipeline.plan.forecast import TracedModels, TracedRun
from qwlora.pipeline.plan.plan import JobTexts, make_plan, resolve_compute
from qwlora.quantize.quantize_model import base_size, quantize_
from qwlora.recipe import Recipe, load_recipe

TOKENS = 32


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose model has a configuration and a tokenizer, and weights that cannot be read."""
    folder = tmp_path_factory.mktemp("plan")
    tiny_model("llama", layers=2).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "model.safetensors").write_bytes(b"no weights")
    content = {
        "name": "planned",
        "model": {"source": str(folder / "model")},
        "data": {"source": str(folder / "text"), "sequence_tokens": TOKENS},
        "adapters": [{"name": "first", "steps": 10, "compute": "float32"}],
    }
    (folder / "text").write_text("a")  # too short for a job
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def recipe(recipe_path: Path) -> Recipe:
    return resolve_compute(load_recipe(recipe_path))


@pytest.fixture(scope="module")
def models(recipe: Recipe) -> TracedModels:
    return TracedModels(recipe)


def test_the_peak_is_what_is_alive_together() -> None:
    with FakeTensorMode(), torch.no_grad():
        x, weight = torch.empty(8, 16), torch.empty(32, 16)
        with (run := TracedRun()):
            y = torch.nn.functional.linear(x, weight)  # 8 x 32
            z = y.relu()  # beside y
            del y
            (z + z).sum()  # z, its double and the sum
    assert run.peak == 4 * (2 * 8 * 32 + 1)
    assert run.outputs == 4 * (3 * 8 * 32 + 1)


def test_training_keeps_what_autograd_keeps() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(8, 16), torch.empty(32, 16, requires_grad=True)
        with (run := TracedRun()):
            torch.nn.functional.linear(x, weight).exp().sum().backward()
    # the exponential and its sum are kept, and the gradient of the sum comes to them
    assert run.peak >= 4 * 2 * 8 * 32


def test_packed_bytes_are_those_of_the_base(models: TracedModels) -> None:
    model = tiny_model("llama", layers=2)
    quantize_(model, "w4-block32", "search")
    size = base_size(model)
    assert models.packed_bytes == size.bytes
    assert models.packed_weights == size.weights
    assert models.float_values == size.float_weights


def test_an_adapter_has_as_many_values_as_pefts(models: TracedModels, recipe: Recipe) -> None:
    attached = attach(tiny_model("llama", layers=2), LoraShape(16, 32.0), 0)
    expected = sum(p.numel() for p in attached.parameters() if p.requires_grad)
    assert models.trained_values(recipe.adapters[0]) == expected


def test_an_evaluation_holds_its_logits(models: TracedModels) -> None:
    run = models.forward("float", TOKENS)
    assert run.peak >= 4 * TOKENS * 260


def test_checkpointing_keeps_less_and_computes_more(models: TracedModels, recipe: Recipe) -> None:
    adapter = recipe.adapters[0]
    plain = models.training(adapter, 64, 2)
    checkpointing = {"name": "again", "gradient_checkpointing": True}
    again = models.training(adapter.model_copy(update=checkpointing), 64, 2)
    assert again.peak < plain.peak
    assert again.operators > plain.operators
    assert models.training(adapter, 64, 4).peak > 1.9 * plain.peak


def test_a_plan_reads_no_weights_and_no_text(recipe_path: Path, tmp_path: Path) -> None:
    done = qwlora("plan", recipe_path, "--json", "--out", tmp_path / "none")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    names = [stage["stage"] for stage in found["stages"]]
    assert names[:3] == ["evaluate/float", "quantize", "evaluate/base"]
    assert {"train/first", "calibrate/first", "export/onnx/first", "verify/onnx/first"} < {*names}
    assert all(stage["peak"] > 0 for stage in found["stages"])
    assert "seconds" not in found
    assert found["problems"] == []
    assert not (tmp_path / "none").exists()


def test_every_kind_of_target_has_an_estimate(recipe_path: Path) -> None:
    shared = (
        "base.weights=w4-block32",
        "simulation.base_activations=adapter_only",
        "simulation.residual_adds=quantize",
    )
    recipe = load_recipe(recipe_path, ("export.targets=[onnx, aimet, qairt, hf]", *shared))
    found = {stage.stage: stage for stage in forecast.plan_job(recipe, Path()).stages}
    assert {"export/qairt", "export/hf", "export/aimet/first", "verify/qairt/none"} < {*found}
    assert all(stage.peak > 0 for stage in found.values())


def test_learned_rounding_takes_memory(recipe: Recipe) -> None:
    gptq = recipe.base.gptq.model_copy(update={"rounding_steps": 200})
    learning = recipe.model_copy(update={"base": recipe.base.model_copy(update={"gptq": gptq})})
    (stage,) = (s for s in make_plan(recipe, JobTexts(recipe, reads=False)) if s.verb == "quantize")
    plain, learned = (forecast.Forecaster(r).stage(stage).memory for r in (recipe, learning))
    assert {*learned} - {*plain} == {
        "learned rounding of a block",
        "float outputs of all calibration sequences",
    }
    block = max(sum(i * o for i, o in shapes) for shapes in TracedModels(recipe).blocks)
    assert learned["learned rounding of a block"] >= 4 * 4 * block


def test_what_does_not_fit_is_named(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = "export.targets=[hf]"  # quick to plan
    monkeypatch.setattr(forecast, "rss_bytes", lambda: 10**8)  # the first plan imports libraries
    found = forecast.plan_job(load_recipe(recipe_path, (targets,)), Path())
    largest = sorted(stage.peak for stage in found.stages)
    limit = int((largest[-1] + largest[-2]) / 2)
    monkeypatch.setattr(forecast, "memory_limit_bytes", lambda: limit)
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda folder: Mock(free=10))
    said = answered("plan", recipe_path, "--set", targets)
    lines = [line for line in said.splitlines() if line.startswith("Does not fit")]
    assert len(lines) == 2
    assert found.largest.stage in lines[0]
    assert any(setting in said for setting in found.largest.settings)
    assert "--out" in lines[1]


def test_a_bound_without_activations_runs_nothing(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = resolve_compute(load_recipe(recipe_path, ("export.targets=[hf]",)))
    stages = make_plan(recipe, JobTexts(recipe, reads=False))
    whole = forecast.estimate(recipe, stages, Path())
    monkeypatch.setattr(forecast, "_traced", None)
    bound = forecast.estimate(recipe, stages, Path(), counts_activations=False)
    for stage, least in zip(whole.stages, bound.stages, strict=True):
        own, fewer = (each.peak - each.memory["process"] for each in (stage, least))
        assert 0 < fewer <= own, stage.stage
        if stage.stage.startswith(("evaluate", "train")):
            assert fewer < own, stage.stage
    assert bound.disk == whole.disk
    assert "at least" in bound.summary


def test_a_model_that_looks_at_its_data_has_no_estimate(recipe_path: Path, tmp_path: Path) -> None:
    config = mixture().config
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path)
    said = refused("plan", recipe_path, "--set", f"model.source={tmp_path}")
    assert "MixtralForCausalLM cannot run on tensors without data" in said
