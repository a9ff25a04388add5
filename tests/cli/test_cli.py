"""The command line with wrong inputs: one clear message, the right exit code, nothing half-written."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import qwlora
from cli.command_line import answered, refused
from cli.command_line import qwlora as qwlora_command
from conftest import byte_tokenizer


def small_model(folder: Path) -> None:
    """Of fewer tokens than the tokenizer's."""
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def cut_model(folder: Path) -> None:
    small_model(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def without_tokenizer(folder: Path) -> None:
    small_model(folder)
    (folder / "tokenizer.json").unlink()


SMALL = ("model.source={tmp}/model",)
WRONG: dict[str, tuple[Callable[[Path], Any] | bytes, tuple[str, ...]]] = {
    "holds no text": (b" \n", ()),
    "training text has 13 tokens, but one sequence needs 32": (b"a few words only", ()),
    "model '/no' does not exist": (b"x", ("model.source=/no",)),
    "mean base.solver\\?": (b"x", ("base.solvr=rtn",)),
    "14 of 14 layers .*q_proj.weight: .*blocks of 48": (b"x", ("base.weights=w4-signed48",)),
    "is truncated, or not a safetensors file": (cut_model, SMALL),
    "tokenizer": (without_tokenizer, SMALL),
    "but the model has only 50 tokens": (small_model, SMALL),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_refused(recipe_for: Any, tmp_path: Path, message: str) -> None:
    content, changes = WRONG[message]
    changes = tuple(f"--set={change.format(tmp=tmp_path)}" for change in changes)
    if callable(content):
        content(tmp_path / "model")
    elif not changes:
        (tmp_path / "text.txt").write_bytes(content)
        changes = (f"--set=data.source={tmp_path / 'text.txt'}",)
    said = refused("run", recipe_for(), "--out", tmp_path / "out", *changes)
    assert re.match(rf"(?s)qwlora: .*({message})", said)
    assert not (tmp_path / "out").exists()


def test_unwritable_parent(
    recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access  # tests may run as root
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != tmp_path and access(p, mode))
    assert "is not writable" in refused("run", recipe_for(), "--out", tmp_path / "out")


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


USAGE = {  # arguments, and facts of the message
    "run --otu x": ("--otu", "Did you mean --out", "Usage: qwlora run"),
    "rnu": ("no command rnu", "run"),
    "generate out": ("prompt is missing", "Usage: qwlora generate"),
    "adapters add out": ("--name is missing",),
    "run --out": ("--out needs a value",),
    "run --quiet=3": ("--quiet takes no value",),
    "chat a b c": ("b c is too much",),
    "generate out hi --max-new-tokens x": ("--max-new-tokens", "'x'", "a whole number"),
    "simulate out --suggest 3": ("--suggest", "'3'", "at most 1"),
    "merge out first --into bla": ("--into", "'bla'", "'float', 'requantized'"),
    "merge out first --into float": ("qwlora: the merged model", "--out"),
    "push out --to x": ("--to", "OWNER/NAME"),
    "": ("Usage: qwlora", "Exit codes"),
}


@pytest.mark.parametrize("words", USAGE)
def test_wrong_arguments_are_named(words: str) -> None:
    said = refused(*words.split()) if words else qwlora_command().stderr
    assert all(fact in said for fact in USAGE[words]), said
    assert not re.search(r"Input should|No such|Missing \w|Got unexpected|Invalid value", said)
    assert said.startswith("qwlora: " if words else "Usage: ")


def test_recipe_and_directory_have_default_names(
    recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("run", "verify", "check", "data", "plan"):
        assert "qwlora init recipe.yaml" in refused(command)
    assert "qwlora init other.yaml" in refused("run", "other.yaml")
    assert answered("init").endswith("then: qwlora run\n")
    (tmp_path / "recipe.yaml").unlink()
    recipe_for("one-layer llama", export={"targets": []})
    answered("quantize", "--quiet")
    assert (tmp_path / "out" / "base").is_dir()
    said = answered("adapters", "add", "out", "--name", "more", "--set", "steps=2")
    assert "qwlora run out" in said
    added = yaml.safe_load(said.split("\n\n")[2])
    first = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["adapters"][0]
    assert added == {"adapters": [{**first, "name": "more", "steps": 2}]}
    assert "which this recipe lacks" in refused("quantize")
    # The job's own recipe is that of the job, whatever the current directory.
    monkeypatch.chdir(tmp_path / "out")
    assert "quantize: skipped" in qwlora_command("quantize").stderr


def test_a_new_recipe_asks_for_its_sources_and_check_shows_what_it_says(
    tmp_path: Path, recipe_for: Any
) -> None:
    path = tmp_path / "new.yaml"
    assert "set model.source and data.source" in answered("init", path)
    assert "another path" in refused("init", path)
    assert re.search("(?s)model.source.*data.source", refused("check", path))
    refused("no-such-verb")
    short, full = (answered("check", recipe_for(), *options) for options in ((), ("--full",)))
    assert ("rslora" in short, "rslora" in full) == (False, True)
