"""What is refused or said about a recipe's model before anything is quantized."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.command_line import answered, refused
from conftest import byte_tokenizer, tiny_model
from qwlora import Scheme, quantize_
from qwlora.errors import SourceError
from qwlora.grid.encoding import measure
from qwlora.grid.scheme import PerBlock
from qwlora.recipe import load_recipe
from qwlora.recipe.model_files import second_rounding
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase


def test_run_and_check_refuse_the_same_early(job_for: Any) -> None:
    job, change = job_for(), "base.solver=keep"
    with pytest.raises(SourceError, match="has no integers to keep") as caught:
        job.run("quantize", changes=[change])
    assert not job.out.exists()
    assert refused("check", job.recipe, "--set", change) == f"qwlora: {caught.value}\n"


def test_kept_scales_that_are_no_float16_are_refused(recipe_for: Any, tmp_path: Path) -> None:
    quantize_(model := tiny_model("llama", layers=1), "w4-block32", "rtn")
    (tmp_path / "kept").mkdir()
    TARGETS["hf"].backend.write_base(ExportedBase(model, byte_tokenizer()), tmp_path / "kept")
    changes = (f"model.source={tmp_path / 'kept'}", "base.solver=keep", "export.targets=[gguf]")
    said = refused("check", recipe_for(), *(f"--set={change}" for change in changes))
    assert re.search(r"target gguf: .*weight: .*its scales are float32", said)


def test_check_refuses_a_context_and_says_what_replaces_bos(job_for: Any, tmp_path: Path) -> None:
    job = job_for(export={"targets": ["qairt"], "layout": "genie"})
    model = tiny_model("llama", layers=1)
    model.config.bos_token_id, model.config.eos_token_id = None, 2
    model.save_pretrained(tmp_path / "model")
    (tokenizer := byte_tokenizer()).save_pretrained(tmp_path / "model")
    change = f"--set=model.source={tmp_path / 'model'}"
    noted = f"no bos-token; genie_config.json has token {tokenizer.pad_token_id}"
    assert noted in answered("check", job.recipe, change)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sliding_window": 64}))
    assert "at most 64" in refused("check", job.recipe, change)


def test_check_and_run_say_that_integers_are_rounded_again(job_for: Any, tmp_path: Path) -> None:
    model, scheme = tiny_model("llama", layers=1), Scheme(3, True, PerBlock(32))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                weight.copy_(measure(weight, scheme).fake_quantize(weight))
    model.save_pretrained(tmp_path / "rounded")
    byte_tokenizer().save_pretrained(tmp_path / "rounded")
    job = job_for(preset="fast")
    assert second_rounding(load_recipe(job.recipe)) is None
    change = f"model.source={tmp_path / 'rounded'}"
    said = answered("check", job.recipe, "--set", change)
    assert re.search("a second time.*model.source to the GGUF file", said)
    with pytest.warns(UserWarning, match="second time"):
        results = job.run("quantize", changes=[change])
    assert "a second time" in results["base"]["second_rounding"]
