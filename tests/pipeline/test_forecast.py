"""What `qwlora plan` says before a job runs: computed from shapes, without weights."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from adapter.small_models import mixture
from cli.command_line import answered
from conftest import byte_tokenizer, tiny_model
from qwlora.adapter.attach import LoraShape, attach
from qwlora.pipeline import forecast
from qwlora.pipeline.forecast import FLOAT, Costs, plan_job
from qwlora.quantize.quantize_model import base_size, quantize_
from qwlora.recipe import load_recipe

TOKENS = 32
MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "plan.json"


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
        "adapters": [{"name": "first", "steps": 10, "init": "zero"}],
    }
    (folder / "text").write_text("a")  # too short for a job
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def test_estimates_are_right_to_a_third(tmp_path: Path) -> None:
    found = json.loads(MEASURED.read_text())["smollm2"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(found["recipe"]))
    peaks = {row["stage"]: row["peak_bytes"] for row in found["rows"]}
    stages = plan_job(load_recipe(tmp_path / "recipe.yaml"), tmp_path).stages
    ratios = {stage.stage: stage.peak / peaks[stage.stage] for stage in stages}
    assert len(ratios) > 10
    assert all(2 / 3 <= ratio <= 4 / 3 for ratio in ratios.values()), ratios


def test_sizes_are_those_of_the_models(recipe_path: Path, tmp_path: Path) -> None:
    costs, model = Costs(load_recipe(recipe_path), []), tiny_model("llama", layers=2)
    assert costs.floats == FLOAT * sum(p.numel() for p in model.parameters())
    attached = attach(tiny_model("llama", layers=2), LoraShape(16, 32.0), 0)
    trained = sum(p.numel() for p in attached.parameters() if p.requires_grad)
    assert 16 * costs.products == FLOAT * trained
    quantize_(model, "w4-block32", "search")
    size = base_size(model)
    assert (costs.packed, costs.codes) == (size.bytes, size.weights)
    assert costs.kept == FLOAT * size.float_weights
    experts = mixture()
    experts.config.architectures = ["MixtralForCausalLM"]
    experts.config.save_pretrained(tmp_path)
    costs = Costs(load_recipe(recipe_path, (f"model.source={tmp_path}",)), [])
    assert costs.floats == FLOAT * sum(p.numel() for p in experts.parameters())
    assert costs.floats == costs.kept + FLOAT * costs.codes


def test_a_plan_reads_no_weights_and_says_what_does_not_fit(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ("plan", recipe_path, "--out", tmp_path / "none")
    found = json.loads(answered(*plan, "--json"))
    assert {"quantize", "verify/onnx/first"} < {stage["stage"] for stage in found["stages"]}
    assert all(stage["peak"] > sum(stage["memory"].values()) > 0 for stage in found["stages"])
    largest = max(found["stages"], key=lambda stage: stage["peak"])
    assert (found["peak"], found["problems"]) == (largest["peak"], [])
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr(forecast, "memory_limit_bytes", lambda: largest["peak"] - 1)
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda folder: Mock(free=10))
    said = answered(*plan)
    memory, disk = (line for line in said.splitlines() if line.startswith("Does not fit"))
    assert all(s["stage"] in memory for s in found["stages"] if s["peak"] == largest["peak"])
    assert "--out" in disk


def test_time_is_that_of_an_earlier_job_here(trained, tmp_path, monkeypatch) -> None:
    job = Path(shutil.copytree(trained, tmp_path / "job"))
    plan = ("plan", job, "--json", "--set", "export.targets=[]", "--set", "adapters.0.steps=1000")
    stages = {s["stage"]: s["seconds"] for s in json.loads(answered(*plan))["stages"]}
    record = json.loads((job / "adapters/first/stage.json").read_text())
    step = record["results"]["train"]["*"]["step_seconds"]
    assert not {"quantize", "train/second"} & stages.keys()  # up to date
    assert stages["train/first"] == pytest.approx(1000 * step, rel=0.5, abs=2)
    doubled = json.loads(answered(*plan, "--set", "adapters.0.batch_sequences=2"))["stages"]
    (seconds,) = (s["seconds"] for s in doubled if s["stage"] == "train/first")
    assert seconds - stages["train/first"] == pytest.approx(1000 * step)
    assert json.loads(answered(*plan))["seconds"] is None  # evaluation has not run
    monkeypatch.setattr(forecast, "machine", dict)
    assert {s["seconds"] for s in json.loads(answered(*plan))["stages"]} == {None}


def test_epochs_and_float_lora_have_a_time(job_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs are steps once the text is known; float LoRA is recorded at a place of its own."""
    monkeypatch.setattr("qwlora.pipeline.run.KNOWN_AFTER", 0.0)
    both = [{"name": name, "rank": 4, "epochs": 1.0} for name in ("first", "second")]
    job = job_for(adapters=both, reference="float")
    results = job.run("quantize", "train")
    steps = results["train"]["first"]["steps"]
    (said,) = (line for line in job.said if "at this pace" in line)
    assert f"of {steps}. Time left at this pace" in said
    plan = ("plan", job.out, "--json", *("--set", "adapters.0.epochs=3"))
    stages = {s["stage"]: s["seconds"] for s in json.loads(answered(*plan))["stages"]}
    assert "train/second" not in stages  # up to date
    for name, part in (("train/first", results), ("train/first/float", results["reference"])):
        assert stages[name] >= 3 * steps * part["train"]["first"]["step_seconds"]
