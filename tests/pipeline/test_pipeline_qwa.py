"""Workflow qwa-lora by recipe: the base's activations are calibrated first, adapters are trained through them, and they stay."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from conftest import tiny_model
from pipeline.conftest import FakeJob, stage_keys
from qwlora.errors import DirectoryError, RecipeError
from qwlora.recipe import load_recipe
from qwlora.simulation.saved_simulation import load_activations

pytestmark = pytest.mark.usefixtures("shared_captures")
FIRST = {"name": "first", "rank": 4, "steps": 4, "warmup_steps": 1, "learning_rate": 5e-3}
SECOND = {**FIRST, "name": "second", "warmup_steps": 0}  # of one structure, captured once
TRAINED = ("quantize", "train")
MEASURED = (*TRAINED, "calibrate", "evaluate")


def test_the_whole_job(job_for: Any) -> None:
    bits = {"activation_bitwidth": 8}
    adapters = [FIRST, SECOND]
    job = job_for("one-layer llama", workflow="qwa-lora", adapters=adapters, simulation=bits)
    results = job.run(*MEASURED)
    positions = [
        job.done.index(name) for name in ("quantize", "quantize/activations", "train/first")
    ]
    assert positions == sorted(positions)
    assert results["base_simulation"]["encodings"] > 0
    perplexity = results["perplexity"]
    assert all(found < perplexity["base"] for found in perplexity["simulated"].values())
    base = load_activations(job.out / "base_simulation")
    for name in ("first", "second"):
        kept = load_activations(job.out / "simulation" / name)
        assert base.keys() < kept.keys()
        assert all(kept[n].equals(encoding) for n, encoding in base.items())

    trained, before = (
        ("quantize/activations", "train/first", "train/second"),
        stage_keys(job.recipe),
    )
    after = stage_keys(job.recipe, "simulation.activation_bitwidth=16")
    assert all(after[name] != before[name] for name in trained)


@pytest.mark.slow
def test_export_is_proved(job_for: Any) -> None:
    job = job_for(workflow="qwa-lora", adapters=[SECOND])
    results, out = job.run(), job.out
    parity = results["parity"]["onnx"]["second"]
    assert parity["worst_layer_steps"] <= 2
    assert parity["perplexity"] == pytest.approx(parity["reference_perplexity"], rel=0.003)
    exported = json.loads((out / "export" / "onnx" / "second" / "model.encodings").read_text())
    by_name = {e["name"]: e for e in exported["activation_encodings"]}
    for name, encoding in load_activations(out / "base_simulation").items():
        assert by_name[name]["scale"] == [float(encoding.scale)]
    assert len(job.done) == 13


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning")
def test_an_adapter_that_had_dropout_goes_on_without_it(job_for: Any, tmp_path: Path) -> None:
    """PEFT's adapters often have some, and a graph of evaluation has none."""
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.05, task_type="CAUSAL_LM")
    start = get_peft_model(tiny_model("llama"), config)
    start.save_pretrained(tmp_path / "from", save_embedding_layers=False)
    steps = {"steps": 2, "warmup_steps": 0}
    begins = {"continue_from": str(tmp_path / "from"), "unknown_base": "accept", "steps": 0}
    adapters = [{"name": "kept", **begins}, {"name": "second", "continue_from": "kept", **steps}]
    job = job_for(workflow="qwa-lora", adapters=adapters)
    job.run("quantize", "train")
    assert [line.split(":")[0] for line in job.said if "dropout" in line] == ["adapter second"]
    for name, dropout in (("kept", 0.05), ("second", 0.0)):
        written = json.loads((job.out / "adapters" / name / "adapter_config.json").read_text())
        assert written["lora_dropout"] == dropout


def test_training_asks_for_the_calibration_first(job: FakeJob) -> None:
    workflow = ["workflow=qwa-lora"]
    job.run("quantize")
    message = r"(?s)train needs quantize/activations, missing .*Run first: qwlora quantize /"
    with pytest.raises(DirectoryError, match=message):
        job.run("train", changes=workflow)
    job.run("quantize", changes=workflow)
    assert job.ran == ["quantize/activations"]


def test_what_cannot_go_together_is_one_error(recipe_for: Any) -> None:
    wrong = [
        {**FIRST, "objective": "recovery", "dropout": 0.1, "gradient_checkpointing": True},
        {**SECOND, "compute": "bfloat16"},
    ]
    path = recipe_for(workflow="qwa-lora", adapters=wrong)
    with pytest.raises(RecipeError) as error:
        load_recipe(path, ("data.packing=documents",))
    keys = ("objective", "dropout", "gradient_checkpointing", "second: compute", "data.packing")
    assert not [key for key in keys if key not in str(error.value)]
