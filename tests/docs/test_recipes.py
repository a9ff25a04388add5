"""Every file in src/qwlora/recipe/examples/ runs as it is written, on a tiny model and little text."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from conftest import VOCABULARY, byte_tokenizer, tiny_model
from formats.gguf_models import metadata_of, stored_shapes, write_file
from qwlora.pipeline import VERBS
from qwlora.pipeline.run import run
from qwlora.recipe import Recipe, load_recipe
from qwlora.targets.registry import TARGETS

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.name for path in (ROOT / "src/qwlora/recipe/examples").glob("*.yaml"))
pytestmark = pytest.mark.usefixtures("shared_captures")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of one layer: a checkpoint folder, and a GGUF file of the types of the demo's."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama", layers=1).save_pretrained(folder / "llama")
    byte_tokenizer().save_pretrained(folder / "llama")
    config = LlamaConfig.from_pretrained(folder / "llama")
    found = {"folder": folder / "llama"}
    for name, table, others in (("gguf", "Q8_0", "Q4_1"), ("vendor.yaml", "Q4_0", "Q4_0")):
        types = {"token_embd.weight": table}
        found[name] = write_file(
            folder / f"{name}.gguf",
            "llama",
            metadata_of("llama", config, "llama"),
            stored_shapes("llama", config),
            lambda name, shape: types.get(name, others) if len(shape) > 1 else "F32",  # noqa: B023
            tokens=VOCABULARY,
            from_floats=name == "vendor.yaml",
        )
    return found


@pytest.fixture
def small(models: dict[str, Path], corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A recipe of src/qwlora/recipe/examples/, with less of everything and nothing else changed."""
    loading = "qwlora.pipeline.stages.job_context.load_tokenizer"
    monkeypatch.setattr(loading, lambda *_: byte_tokenizer())  # the tiny GGUF file has none

    def read(name: str) -> Recipe:
        path = ROOT / "src/qwlora/recipe/examples" / name
        keeps = load_recipe(path, (f"model.source={models['gguf']}",)).base.solver == "keep"
        source = models.get(name, models["gguf" if keeps else "folder"])
        changes = [f"model.source={source}", f"data.source={corpus}", "data.sequence_tokens=32"]
        changes += [f"data.{part}_sequences=2" for part in ("evaluation", "calibration")]
        changes += ["base.calibration_sequences=4", "verify.sequences=2"]
        changes += ["verify.perplexity_difference=0.05"]
        for i in range(len(load_recipe(path).adapters)):
            changes += [f"adapters.{i}.{c}" for c in ("steps=2", "warmup_steps=1", "rank=4")]
        return load_recipe(path, tuple(changes))

    return read


# the fast lane runs those that differ most; the test below, in the slow lane, runs all
@pytest.mark.parametrize("name", ["npu.yaml", "research.yaml", "vendor.yaml"])
def test_a_recipe_is_quantized_trained_and_exported(name: str, small: Any, tmp_path: Path) -> None:
    recipe = small(name)
    targets = [TARGETS[name] for name in recipe.export.targets]
    captured = any(t.is_simulated for t in targets)  # these: the test below
    verbs = ("quantize", "train") if captured else ("quantize", "train", "export")
    results = run(recipe, tmp_path / "out", verbs)
    assert set(results["train"]) == {adapter.name for adapter in recipe.adapters}
    assert set(results.get("export", {})) == (set() if captured else set(recipe.export.targets))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_to_its_end(name: str, small: Any, tmp_path: Path) -> None:
    recipe = small(name)
    results = run(recipe, tmp_path / "out", VERBS)
    assert results["run"]["state"] == "finished"
    for target in recipe.export.targets:
        for adapter in recipe.adapters:
            parity = results["parity"][target][adapter.name]
            assert parity.get("passed") or "not_run" in parity
