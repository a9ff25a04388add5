"""Recovery: the loss against its definition, and what it brings back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from conftest import ARCHITECTURES, tiny_model
from qwlora import quantize_
from qwlora.adapter.recovery import Recovery
from qwlora.adapter.train import TrainingSettings, train_adapter
from qwlora.errors import RecipeError
from qwlora.pipeline.run import run
from qwlora.recipe import load_recipe

IDS = torch.randint(0, 250, (16, 24), generator=torch.Generator().manual_seed(0))


def pair(architecture: str) -> tuple[Any, PreTrainedModel]:
    teacher = tiny_model(architecture)
    model = copy.deepcopy(teacher)
    quantize_(model, "w2-block32-asymmetric")
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")), teacher


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_distance_is_that_of_the_states_before_the_heads(architecture: str) -> None:
    model, teacher = pair(architecture)
    with torch.no_grad():
        h, g = (m(IDS[:2], output_hidden_states=True).hidden_states[-1] for m in (model, teacher))
    recovery = Recovery(model, teacher)
    model(input_ids=IDS[:2], labels=IDS[:2])
    found = recovery.distance({"input_ids": IDS[:2], "labels": IDS[:2]})
    recovery.remove()
    assert float(found.detach()) == pytest.approx(float((h - g).square().sum() / g.square().sum()), rel=1e-4)
    assert found.requires_grad
    assert teacher(IDS[:1]).logits.shape[-1] == 260, "the float model runs through again"


@pytest.mark.parametrize("loss", ["chunked", "whole"])
def test_training_to_recover_comes_nearer_to_the_float_model_than_training_on_the_text(loss: str, tmp_path: Path) -> None:
    distances = {}
    for name in ("base", "text", "recovery"):
        model, teacher = pair("llama")
        if name != "base":
            settings = TrainingSettings(30, 5e-3, 4, 1, "cosine", 30, 0, loss=loss)
            train_adapter(model, IDS, settings, tmp_path / name, teacher=teacher if name == "recovery" else None)
        with torch.no_grad():
            distances[name] = float((model.eval()(IDS).logits - teacher(IDS).logits).square().mean())
    assert distances["recovery"] < 0.8 * distances["base"]
    assert distances["recovery"] < 0.8 * distances["text"]


def test_one_recovery_is_the_start_of_two_adapters(recipe_for: Any, tmp_path: Path) -> None:
    plain = {"rank": 4, "steps": 4, "warmup_steps": 1}
    adapters = [{"name": "back", "objective": "recovery", **plain}, *({"name": n, "start": "back", "steps": 2, "warmup_steps": 1} for n in ("one", "two"))]
    recipe = load_recipe(recipe_for(adapters=adapters))
    said: list[str] = []
    results = run(recipe, tmp_path / "out", ("quantize", "train"), say=said.append)
    assert set(results["train"]) == {"back", "one", "two"}
    changed = load_recipe(recipe_for(adapters=[{**adapters[0], "steps": 5}, *adapters[1:]]))
    said.clear()
    run(changed, tmp_path / "out", ("quantize", "train"), say=said.append)
    assert [line for line in said if "skipped" in line] == ["quantize: skipped, nothing that it depends on has changed"]


def test_a_start_that_comes_later_and_a_recovery_without_floats_are_refused(recipe_for: Any) -> None:
    later = [{"name": "one", "start": "two"}, {"name": "two"}]
    with pytest.raises(RecipeError, match="one starts from two, which must be listed before it"):
        load_recipe(recipe_for(adapters=later))
    with pytest.raises(RecipeError, match="adapters back: recovery, and a start other than zero, need floats"):
        load_recipe(recipe_for(adapters=[{"name": "back", "objective": "recovery"}], base={"solver": "keep"}))
