"""What `qwlora plan` says before a job runs: counted from shapes, without weights."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from qwlora.pipeline.job.stage_records import Stage
from qwlora.pipeline.plan.plan import resolve_compute

from adapter.small_models import mixture
from cli.command_line import answered, qwlora
from conftest import byte_tokenizer, tiny_model
from qwlora.adapter.attach import LoraShape, attach
from qwlora.pipeline.running import forecast
from qwlora.pipeline.running.forecast import Forecaster
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
def models(recipe: Recipe) -> Forecaster:
    return Forecaster(recipe)


def test_packed_bytes_are_those_of_the_base(models: Forecaster) -> None:
    model = tiny_model("llama", layers=2)
    quantize_(model, "w4-block32", "search")
    size = base_size(model)
    assert models.packed_bytes == size.bytes
    assert models.packed_weights == size.weights
    assert models.float_values == size.float_weights


def test_an_adapter_has_as_many_values_as_pefts(models: Forecaster, recipe: Recipe) -> None:
    attached = attach(tiny_model("llama", layers=2), LoraShape(16, 32.0), 0)
    expected = sum(p.numel() for p in attached.parameters() if p.requires_grad)
    assert models.trained["first"] == expected


def test_memory_grows_with_text_and_shrinks_with_checkpointing(recipe: Recipe) -> None:
    def peak(tokens: int = TOKENS, rows: int = 1, **settings: Any) -> float:
        data = recipe.data.model_copy(update={"sequence_tokens": tokens})
        given = {"batch_sequences": rows, "init": "zero", **settings}
        adapter = recipe.adapters[0].model_copy(update=given)
        changed = recipe.model_copy(update={"data": data, "adapters": [adapter]})
        memory, _ = Forecaster(changed).needed(Stage("train/first", "", "first"))
        return memory["activations"]

    assert peak(rows=4) == peak(tokens=4 * TOKENS) > 2 * peak()
    assert peak(gradient_checkpointing=True) < peak()


def test_an_evaluation_holds_its_logits(models: Forecaster) -> None:
    memory, _ = models.needed(Stage("evaluate/float", ""))
    assert memory["activations and logits"] >= 2 * 4 * TOKENS * 260


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


def test_experts_are_counted_in_the_weights(recipe_path: Path, tmp_path: Path) -> None:
    model = mixture()
    model.config.architectures = ["MixtralForCausalLM"]
    model.config.save_pretrained(tmp_path)
    models = Forecaster(load_recipe(recipe_path, (f"model.source={tmp_path}",)))
    assert models.values == sum(p.numel() for p in model.parameters())
    assert models.packed_weights + models.float_values == models.values
