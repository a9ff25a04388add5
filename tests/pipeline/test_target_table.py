"""What is refused or said about a recipe's model before anything is quantized."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cli.command_line import answered, refused
from conftest import byte_tokenizer, tiny_model
from formats.test_model_card import gguf
from qwlora import Scheme, quantize_
from qwlora.errors import MissingExtraError, SourceError
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


def test_a_package_that_writing_needs_is_asked_for_before_training(
    job_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, target = job_for(), replace(TARGETS["hf"], writers=("not_there",))
    monkeypatch.setitem(TARGETS, "hf", target)
    assert "not_there" in answered("check", job.recipe, "--set", "export.targets=[hf]")
    job.run("quantize", changes=["export.targets=[hf]"])  # writes no files of a target
    with pytest.raises(MissingExtraError, match="not_there"):
        job.run(changes=["export.targets=[hf]"])
    assert not (job.out / "adapters").exists()


def test_kept_scales_that_are_no_float16_are_refused(recipe_for: Any, tmp_path: Path) -> None:
    quantize_(model := tiny_model("llama", layers=1), "w4-block32", "rtn")
    (tmp_path / "kept").mkdir()
    TARGETS["hf"].backend.write_base(ExportedBase(model, byte_tokenizer()), tmp_path / "kept")
    changes = (f"model.source={tmp_path / 'kept'}", "base.solver=keep", "export.targets=[gguf]")
    said = refused("check", recipe_for(), *(f"--set={change}" for change in changes))
    assert re.search(r"target gguf: .*weight: .*its scales are float32", said)


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
    assert "a second time" in answered("check", job.recipe, "--set", change)
    with pytest.warns(UserWarning, match="second time"):
        results = job.run("quantize", changes=[change])
    assert "a second time" in results["base"]["second_rounding"]


def test_integers_of_gguf_are_kept_by_a_solver(
    recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    source = f"model.source={gguf(tmp_path / 'model.gguf')}"
    recipe = load_recipe(recipe_for(), (source,))
    for kinds, said in ((("F32", "F16"), False), (("F32", "Q4_K", "Q8_0"), True)):
        tensors = {kind: SimpleNamespace(kind=kind) for kind in kinds}
        monkeypatch.setattr(
            "qwlora.formats.gguf.gguf_file.GgufFile",
            lambda path, tensors=tensors: SimpleNamespace(tensors=tensors),
        )
        note = second_rounding(recipe)
        assert (note is not None) == said
    assert "(Q4_K, Q8_0)" in str(note)
    assert second_rounding(load_recipe(recipe_for(base={"solver": "keep"}), (source,))) is None
