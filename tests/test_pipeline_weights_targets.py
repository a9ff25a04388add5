"""Jobs that export the base once and adapters beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qwlora import load_adapter, load_base
from qwlora.errors import FingerprintError, RecipeError
from qwlora.export.registry import TARGETS
from qwlora.pipeline.run_job import run
from qwlora.pipeline.stages import VERBS
from qwlora.recipe import load_recipe

ADAPTERS = [
    {"name": name, "rank": rank, "steps": 4, "warmup_steps": 1, "rslora": rank == 3}
    for name, rank in (("first", 2), ("second", 3))
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def job(recipe_for: Any, finished: Path) -> Path:
    """A finished job; made once."""
    if not (finished / "job").exists():
        recipe = recipe_for(export={"targets": ["hf", "mlx"]}, adapters=ADAPTERS)
        run(load_recipe(recipe), finished / "job", VERBS)
    return finished / "job"


def test_the_base_is_written_once_and_every_adapter_beside_it(job: Path) -> None:
    for name in ("hf", "mlx"):
        folders = {path.name for path in (job / "export" / name).iterdir()}
        assert folders == {"base", "first", "second"}
    results = json.loads((job / "results.json").read_text())
    assert results["export"]["hf"].keys() == {"base", "first", "second"}
    for name in ("first", "second"):
        assert results["parity"]["hf"][name]["passed"]
        assert results["parity"]["hf"][name]["off_is_equal"]
        mlx = results["parity"]["mlx"][name]
        if missing := TARGETS["mlx"].missing():
            assert mlx == {"not_run": missing}
        else:
            assert mlx["passed"]


def test_what_transformers_loads_is_what_was_trained(job: Path) -> None:
    ids = torch.arange(20)[None]
    folder = job / "export" / "hf"
    for name in ("first", "second"):
        ours = load_adapter(load_base(job / "base"), job / "adapters" / name).eval()
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, folder / name).eval()
        with torch.no_grad():
            expected, found = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
        assert float((found - expected).abs().max()) < 1e-4


def test_a_second_run_skips_everything_and_renaming_keeps_the_base(
    job: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(job, tmp_path / "job"))
    said: list[str] = []
    run(load_recipe(copy / "recipe.yaml"), copy, ("quantize", "train", "export"), say=said.append)
    assert not [line for line in said if line.endswith(" ...")]


def test_files_that_changed_are_not_verified(job: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(job, tmp_path / "job"))
    file = copy / "export" / "hf" / "second" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises((FingerprintError, Exception), match=r"export/hf/second"):
        run(load_recipe(copy / "recipe.yaml"), copy, ("verify",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dora": True}, "hf holds LoRA factors .* no DoRA"),
        ({"name": "base"}, "base is the name of another folder in export/hf"),
    ],
)
def test_adapters_that_a_target_cannot_hold_are_refused_at_once(
    recipe_for: Any, change: dict[str, Any], message: str
) -> None:
    adapter = {**ADAPTERS[0], **change}
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_for(export={"targets": ["hf"]}, adapters=[adapter]))


@pytest.mark.parametrize(
    ("target", "base", "message"),
    [
        ("mlx", {"weights": {"bitwidth": 7, "block_size": 32}}, "mlx cannot hold int7"),
        ("mlx", {"weights": {"bitwidth": 4, "block_size": 16}}, "MLX has groups of 32"),
        (
            "hf",
            {
                "weights": {"bitwidth": 4, "symmetric": False, "block_size": 32},
                "rules": [{"match": "*.mlp.*", "bitwidth": 8}],
            },
            "int4 asymmetric.*, int8 asymmetric.* together",
        ),
    ],
)
def test_a_grid_that_a_target_cannot_hold_is_refused_at_once(
    recipe_for: Any, target: str, base: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_for(export={"targets": [target]}, base=base))
