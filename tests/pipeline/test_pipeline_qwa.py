"""Workflow qwa-lora by recipe: the base's activations are calibrated first, adapters are trained through them, and they stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import tiny_model
from pipeline.conftest import stage_keys
from qwlora.errors import DirectoryError, RecipeError, TrainingError
from qwlora.pipeline.running.run_job import run
from qwlora.recipe import load_recipe
from qwlora.simulation.saved_simulation import load_activations

pytestmark = pytest.mark.usefixtures("shared_captures")
FIRST = {"name": "first", "rank": 4, "steps": 4, "warmup_steps": 1, "learning_rate": 5e-3}
SECOND = {"name": "second", "rank": 2, "steps": 4, "warmup_steps": 0, "learning_rate": 5e-3}
TRAINED = ("quantize", "calibrate-base", "train")
MEASURED = (*TRAINED, "calibrate", "evaluate")


def run_recipe(
    path: Path, out: Path, *changes: str, **options: Any
) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    return run(load_recipe(path, changes), out, say=said.append, **options), said


def done(said: list[str]) -> list[str]:
    return [line.split(":")[0] for line in said if ": done" in line]


def test_the_whole_job(recipe_for: Any, tmp_path: Path) -> None:
    bits = {"activation_bitwidth": 8}
    path = recipe_for(
        "one-layer llama", workflow="qwa-lora", adapters=[FIRST, SECOND], simulation=bits
    )
    out = tmp_path / "out"
    results, said = run_recipe(path, out, verbs=MEASURED)
    order = done(said)
    assert order.index("quantize") < order.index("calibrate-base") < order.index("train/first")
    assert results["base_simulation"]["encodings"] > 0
    assert all(
        results["perplexity"]["simulated"][n] < results["perplexity"]["base"]
        for n in ("first", "second")
    )
    base = load_activations(out / "base_simulation")
    for name in ("first", "second"):
        kept = load_activations(out / "simulation" / name)
        assert set(base) < set(kept)
        assert all(
            torch.equal(kept[n].scale, e.scale) and torch.equal(kept[n].offset, e.offset)
            for n, e in base.items()
        )

    _, said = run_recipe(out / "recipe.yaml", out, verbs=MEASURED)
    assert done(said) == []
    trained, before = ("calibrate-base", "train/first", "train/second"), stage_keys(path)
    for change, again in (
        ("adapters.0.steps=5", trained[1:2]),
        ("simulation.activation_bitwidth=16", trained),
    ):
        after = stage_keys(path, change)
        assert tuple(name for name in trained if after[name] != before[name]) == again


@pytest.mark.slow
def test_export_is_proved(recipe_for: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results, said = run_recipe(recipe_for(workflow="qwa-lora", adapters=[SECOND]), out)
    parity = results["parity"]["onnx"]["second"]
    assert parity["worst_layer_steps"] <= 2
    assert parity["perplexity"] == pytest.approx(parity["reference_perplexity"], rel=0.003)
    exported = json.loads((out / "export" / "onnx" / "second" / "model.encodings").read_text())
    by_name = {e["name"]: e for e in exported["activation_encodings"]}
    for name, encoding in load_activations(out / "base_simulation").items():
        assert by_name[name]["scale"] == [float(encoding.scale)]
    assert len(done(said)) == 13


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning")
def test_an_adapter_that_had_dropout_goes_on_without_it(recipe_for: Any, tmp_path: Path) -> None:
    """PEFT's adapters often have some, and a graph of evaluation has none."""
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.05, task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama"), config).save_pretrained(
        tmp_path / "from", save_embedding_layers=False
    )
    steps = {"steps": 2, "warmup_steps": 0}
    begins = {"continue_from": str(tmp_path / "from"), "unknown_base": "accept"}
    adapters = [
        {"name": "kept", **begins, "steps": 0},
        {"name": "first", **begins, **steps},
        {"name": "second", "continue_from": "kept", **steps},
    ]
    path, out = recipe_for(workflow="qwa-lora", adapters=adapters), tmp_path / "out"
    _, said = run_recipe(path, out, verbs=("quantize", "calibrate-base", "train"))
    told = [line for line in said if "dropout" in line]
    note = f"{tmp_path / 'from'} has dropout 0.05; workflow qwa-lora trains without dropout"
    assert told == [f"adapter {name}: {note}" for name in ("first", "second")]
    starts = [line for line in said if line.startswith("train/first ...")]
    assert said.index(told[0]) < said.index(starts[0])
    dropouts = {
        n: json.loads((out / "adapters" / n / "adapter_config.json").read_text())["lora_dropout"]
        for n in ("kept", "first", "second")
    }
    assert dropouts == {"kept": 0.05, "first": 0.0, "second": 0.0}


def test_training_asks_for_the_calibration_first(recipe_for: Any, tmp_path: Path) -> None:
    path, out = recipe_for(workflow="qwa-lora"), tmp_path / "out"
    run_recipe(path, out, verbs=("quantize",))
    message = r"(?s)train needs calibrate-base, missing .*Run first: qwlora calibrate-base --out"
    with pytest.raises(DirectoryError, match=message):
        run_recipe(path, out, verbs=("train",))
    _, said = run_recipe(path, out, verbs=("calibrate-base",))
    assert done(said) == ["calibrate-base"]


def test_what_cannot_go_together_is_one_error(recipe_for: Any) -> None:
    wrong = [
        {**FIRST, "objective": "recovery", "dropout": 0.1, "gradient_checkpointing": True},
        {**SECOND, "compute": "bfloat16", "loss": "chunked"},
    ]
    path = recipe_for(workflow="qwa-lora", adapters=wrong)
    with pytest.raises(RecipeError) as error:
        load_recipe(path, ("data.packing=documents",))
    problem = "\n".join(error.value.problems)
    for part in (
        "workflow qwa-lora: adapter first: objective recovery",
        "adapter first: dropout",
        "adapter first: gradient_checkpointing",
        "adapter second: compute bfloat16",
        "adapter second: loss chunked",
        "data.packing documents",
    ):
        assert part in problem
    assert load_recipe(recipe_for(workflow="qwa-lora", adapters=[FIRST])).adapters[0].loss is None


def test_documents_that_share_a_sequence_are_found_out_before_anything_is_written(
    recipe_for: Any, tmp_path: Path
) -> None:
    source = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"what is {i}", "completion": f"it is {i}"} for i in range(40)]
    source.write_text("\n".join(map(json.dumps, pairs)))
    path = recipe_for(workflow="qwa-lora", data={"source": str(source), "sequence_tokens": 64})
    with pytest.raises(TrainingError, match="packs several documents into a sequence"):
        run_recipe(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
