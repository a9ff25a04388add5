"""What `qwlora plan` says before a job runs: computed from shapes, without weights."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from adapter.small_models import mixture
from cli.command_line import answered, qwlora
from conftest import byte_tokenizer, tiny_model
from qwlora.adapter.attach import LoraShape, attach
from qwlora.pipeline import forecast
from qwlora.pipeline.forecast import FLOAT, Costs, plan_job
from qwlora.pipeline.stage import ZERO, Stage
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


def test_memory_grows_with_text_and_shrinks_with_checkpointing(recipe_path: Path) -> None:
    def activations(*changes: str) -> float:
        changed = load_recipe(recipe_path, changes)
        stage = Stage("train/first", "train", {}, adapter="first")
        return Costs(changed, []).of(stage)[0]["activations"]

    rows = activations("adapters.0.batch_sequences=4")
    assert rows == activations(f"data.sequence_tokens={4 * TOKENS}") == 4 * activations()
    assert activations("adapters.0.gradient_checkpointing=true") == activations() / 2


def test_a_stage_reads_the_text_that_it_names(recipe_path: Path) -> None:
    own = f"{{name: other, data: {{source: {recipe_path}, sequence_tokens: {4 * TOKENS}}}}}"
    costs = Costs(load_recipe(recipe_path, (f"adapters=[{{name: first}}, {own}]",)), [])
    stages = (
        Stage("evaluate/base", "evaluate/base", {}),
        Stage("evaluate/base/on/other", "evaluate/base/on", {}, text="other"),
    )
    logits = [costs.of(stage)[0]["loading, or logits"] for stage in stages]
    assert logits[1] == 4 * logits[0] > 0


def test_a_plan_reads_no_weights_and_no_text(recipe_path: Path, tmp_path: Path) -> None:
    done = qwlora("plan", recipe_path, "--json", "--out", tmp_path / "none")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert {"quantize", "verify/onnx/first"} < {stage["stage"] for stage in found["stages"]}
    assert all(stage["peak"] > sum(stage["memory"].values()) > 0 for stage in found["stages"])
    assert found["peak"] == max(stage["peak"] for stage in found["stages"])
    assert found["problems"] == []
    assert not (tmp_path / "none").exists()


def test_every_kind_of_target_has_an_estimate(recipe_path: Path) -> None:
    shared = "simulation={base_activations: adapter_only, residual_adds: quantize}"
    targets = ("base.weights=w4-block32", "export.targets=[onnx, aimet, qairt, hf]")
    recipe = load_recipe(recipe_path, (*targets, shared))
    stages = {stage.stage: stage for stage in plan_job(recipe, Path()).stages}
    assert {"export/qairt", "export/hf", "export/aimet/first", "verify/qairt/none"} < {*stages}
    assert all(stage.memory for stage in stages.values())
    simulated = "simulated zero adapter"  # stays in memory for the adapters' stages
    assert simulated not in stages[ZERO].memory
    assert stages["calibrate/first"].memory[simulated] > 0


def test_what_does_not_fit_is_named(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = "export.targets=[hf]"
    found = plan_job(load_recipe(recipe_path, (targets,)), Path())
    largest = sorted(stage.peak for stage in found.stages)
    limit = (largest[-1] + largest[-2]) / 2
    monkeypatch.setattr(forecast, "memory_limit_bytes", lambda: limit)
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda folder: Mock(free=10))
    said = answered("plan", recipe_path, "--set", targets)
    memory, disk = (line for line in said.splitlines() if line.startswith("Does not fit"))
    assert found.largest.stage in memory
    assert found.largest.settings in said
    assert "--out" in disk
