"""`qwlora train MODEL DATA`, and recipes that ship inside the package."""

from pathlib import Path

import pytest

from cli.command_line import answered, qwlora, refused
from qwlora.recipe import load_recipe
from qwlora.recipe.reference import short_recipe

FEW = ("steps=2", "rank=4")
SMALL = ("data.sequence_tokens=32", "data.evaluation_sequences=2", "verify.sequences=2")


def test_one_command_trains_exports_and_answers(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    changes = [*SMALL, *(f"adapters.0.{change}" for change in FEW), "preset=fast"]
    options = [word for change in changes for word in ("--set", change)]
    words = (
        "train",
        checkpoints["one-layer llama"],
        corpus,
        "--for",
        "vllm",
        "--out",
        tmp_path / "o",
    )
    done = qwlora(*words, *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o/export/hf" / corpus.stem / "adapter_config.json").is_file()
    written = load_recipe(tmp_path / "o/recipe.yaml")
    assert written.model_fields_set == {"model", "data", "adapters", "export", "preset", "verify"}
    assert [a.name for a in written.adapters] == [corpus.stem]
    assert done.stdout.count("prompt   ") == 2
    again = qwlora(*words, *options)
    assert "quantize: skipped" in again.stderr


@pytest.mark.parametrize(
    ("model", "data", "runtime", "target", "name", "solver"),
    [
        ("m.gguf", "data/my chats.jsonl", "Ollama", "gguf", "my", "keep"),
        ("m.gguf", "python:pydoc_data.topics:topics", "vllm", "hf", "topics", None),
        ("owner/model", "owner/some.data", "mlx", "mlx", "some", None),
        ("owner/model", "../.", "qualcomm", "qairt", "first", None),
    ],
)
def test_the_recipe_follows_from_the_words(
    model: str, data: str, runtime: str, target: str, name: str, solver: str | None
) -> None:
    recipe = short_recipe(model, data, runtime)
    assert recipe["export"]["targets"] == [target]
    assert recipe["adapters"] == [{"name": name}]
    assert recipe.get("base", {}).get("solver") == solver


def test_a_runtime_that_nobody_knows(corpus: Path, tmp_path: Path) -> None:
    said = refused("train", tmp_path, corpus, "--for", "tensorrt", "--out", tmp_path / "o")
    assert "'tensorrt'" in said
    assert "llama.cpp" in said
    assert not (tmp_path / "o").exists()


def test_examples_are_written_by_name(tmp_path: Path) -> None:
    answered("init", tmp_path / "npu.yaml", "--example", "npu")
    assert "w4-lpbq64" in (tmp_path / "npu.yaml").read_text()
    said = refused("init", tmp_path / "x.yaml", "--example", "npi")
    assert "'npi'" in said
    assert "vendor" in said
