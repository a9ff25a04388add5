"""The command line with wrong inputs: one clear message, the right exit code, nothing half-written."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import qwlora
from cli.command_line import answered, refused
from conftest import byte_tokenizer


def refused_run(recipe: Path, out: Path, *arguments: str) -> str:
    """The message of a refused run; the directory is as it was."""
    before = sorted(out.rglob("*")) if out.exists() else None
    message = refused("run", recipe, "--out", out, *arguments)
    assert message.startswith("qwlora: ")
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    return message


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("text.txt", b" \n", "holds no text"),
        (
            "text.txt",
            b"a few words only",
            "text.txt': the training text has 13 tokens, but one sequence needs 32",
        ),
        ("out/thesis.txt", b"x", "is not empty and was not made by qwlora"),
        ("out", b"x", "is a file; --out names a directory"),
    ],
)
def test_wrong_input_is_refused(
    recipe_for: Any, tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content)
    data = {"data": {"source": str(tmp_path / file), "sequence_tokens": 32}}
    recipe = recipe_for(**(data if file == "text.txt" else {}))
    assert message in refused_run(recipe, tmp_path / "out")


def test_wrong_recipes_are_refused(recipe_for: Any, tmp_path: Path) -> None:
    mistakes = {"model.source=/no": "model '/no' does not exist", "base.solvr=rtn": "mean solver?"}
    for change, message in mistakes.items():
        assert message in refused_run(recipe_for(), tmp_path / "out", "--set", change)


def test_block_size_that_does_not_divide(recipe_for: Any, tmp_path: Path) -> None:
    message = refused_run(recipe_for(), tmp_path / "out", "--set", "base.weights=w4-signed48")
    assert "14 of 14 layers do not fit their scheme; choose a block size that" in message
    first = "layers.0.self_attn.q_proj.weight: int4 symmetric per signed block 48 does not fit"
    assert f"{first}: blocks of 48 do not divide the last axis" in message
    assert refused("check", recipe_for(), "--set", "base.weights=w4-signed48") == message


def test_damaged_model(recipe_for: Any, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    broken = shutil.copytree(checkpoints["llama"], tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    recipe = recipe_for(model={"source": str(broken)})
    assert "is truncated, or not a safetensors file" in refused_run(recipe, tmp_path / "out")


def test_tokenizer_of_another_model(recipe_for: Any, tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    recipe = recipe_for(model={"source": str(tmp_path / "small")})
    assert "tokenizer" in refused_run(recipe, tmp_path / "out")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    assert "but the model has only 50 tokens" in refused_run(recipe, tmp_path / "out")


def test_unwritable_parent(
    recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access  # tests may run as root
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != tmp_path and access(p, mode))
    assert "is not writable" in refused_run(recipe_for(), tmp_path / "out")


@pytest.fixture(params=["100k", "180k"])
def small_disk(mounted: Any, request: pytest.FixtureRequest) -> Path:
    """A file system without room for the base, and one that is full once training begins."""
    disk: Path = mounted(f"size={request.param}")
    return disk


def test_full_disk(recipe_for: Any, small_disk: Path) -> None:
    out = small_disk / "out"
    recipe = recipe_for("one-layer llama")
    assert "no space left on the disk" in refused("run", recipe, "--out", out)
    if (out / "base").exists():
        qwlora.load_base(out / "base")  # what was finished is whole
    assert not (out / "adapters").exists()
    assert not (out / ".qwlora" / "scratch").exists()


def test_what_must_run_first_is_a_whole_command(recipe_for: Any, tmp_path: Path) -> None:
    recipe, out = recipe_for(), tmp_path / "an out"
    message = refused("train", recipe, "--out", out, "--set", "seed=3")
    assert message.endswith(f"Run first: qwlora quantize {recipe} --out '{out}' --set seed=3\n")
    assert not out.exists()
    answered("quantize", recipe, "--out", out, "--quiet")
    message = refused("evaluate", out, "--device", "cpu")
    assert message.endswith(f"Run first: qwlora train '{out}' --device cpu\n")


def test_init_check_and_wrong_command_lines(tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    assert "set model.source and data.source" in answered("init", path)
    assert path.exists()
    message = refused("init", path)
    assert re.search(f"{path}.*another path", message)
    assert "recipe" not in message.replace(str(path), "")
    message = refused("check", path)
    assert "model.source" in message
    assert "data.source" in message
    refused("run", path)
    refused("no-such-verb")


@pytest.mark.parametrize("group", [(), ("adapters",), ("encodings",)])
def test_help_has_whole_summaries(monkeypatch: pytest.MonkeyPatch, group: tuple[str, ...]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    commands = answered(*group, "--help").partition("Commands:")[2]
    assert commands
    assert "..." not in commands


def test_check_prints_what_is_set_or_every_default(recipe_for: Any) -> None:
    path = recipe_for(base={"weights": "w4-block32"}, preset="balanced")
    short, full = answered("check", path), answered("check", path, "--full")
    assert "learning_rate: 0.0005" in full
    assert "rslora" not in short
    base = ("solver: gptq", "weights: w4-block32")
    assert all(part in out for out in (short, full) for part in base)
