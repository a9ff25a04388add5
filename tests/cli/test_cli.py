"""The command line with wrong inputs: one clear message, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import qwlora
from cli.command_line import qwlora as cli
from conftest import byte_tokenizer

pytestmark = pytest.mark.usefixtures("shared_captures")


@pytest.fixture
def call() -> Any:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        done = cli(*arguments)
        return done.returncode, done.stdout, done.stderr

    return run


def refused(call: Any, recipe: Path, out: Path, *arguments: str) -> str:
    """The message of a refused run; the directory is as it was."""
    before = sorted(out.rglob("*")) if out.exists() else None
    code, _, errors = call("run", recipe, "--out", out, *arguments)
    assert code == 2
    assert errors.startswith("qwlora: ")
    assert "Traceback" not in errors
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    return str(errors)


@pytest.mark.parametrize(
    ("sections", "content", "message"),
    [
        ({"model": {"source": "/not/there"}}, None, "model '/not/there' does not exist"),
        ({"base": {"solvr": "rtn"}}, None, "did you mean solver?"),
        ({}, {"file.txt": b" \n"}, "holds no text"),
        (
            {},
            {"file.txt": b"a few words only"},
            "training text has 13 tokens, but one sequence needs 32",
        ),
        ({}, {"file.txt": b"\xff\xfe\x00"}, "byte 1 of the line (0xff) is not UTF-8 text"),
        ({}, {"out/thesis.txt": b"x"}, "is not empty and was not made by qwlora"),
        ({}, {"out": b"x"}, "is a file; --out names a directory"),
    ],
)
def test_wrong_input_is_refused(
    call: Any,
    recipe_for: Any,
    tmp_path: Path,
    sections: dict[str, Any],
    content: dict[str, bytes] | None,
    message: str,
) -> None:
    for name, data in (content or {}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
        if name == "file.txt":
            sections = {"data": {"source": str(tmp_path / name), "sequence_tokens": 32}}
    assert message in refused(call, recipe_for(**sections), tmp_path / "out")


def test_block_size_that_does_not_divide(call: Any, recipe_for: Any, tmp_path: Path) -> None:
    message = refused(call, recipe_for(), tmp_path / "out", "--set", "base.weights.block_size=48")
    assert "14 of 14 layers do not fit their scheme; choose a block size that" in message
    first = "model.layers.0.self_attn.q_proj.weight: int4 symmetric per block 48 does not fit"
    assert f"{first}: blocks of 48 do not divide the last axis" in message


def test_damaged_model(
    call: Any, recipe_for: Any, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    broken = shutil.copytree(checkpoints["llama"], tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    recipe = recipe_for(model={"source": str(broken)})
    assert "is truncated, or not a safetensors file" in refused(call, recipe, tmp_path / "out")


def test_tokenizer_of_another_model(call: Any, recipe_for: Any, tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    recipe = recipe_for(model={"source": str(tmp_path / "small")})
    assert "tokenizer" in refused(call, recipe, tmp_path / "out")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    message = refused(call, recipe, tmp_path / "out")
    assert "but the model has only 50 tokens" in message


def test_unwritable_parent(
    call: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: False if Path(path) == tmp_path else access(path, mode)
    )  # tests may run as root
    assert "is not writable" in refused(call, recipe_for(), tmp_path / "out")


@pytest.fixture(params=["100k", "300k"])
def small_disk(mounted: Any, request: pytest.FixtureRequest) -> Path:
    """A file system without room for the base, and one that is full once training begins."""
    disk: Path = mounted(f"size={request.param}")
    return disk


def test_full_disk(call: Any, recipe_for: Any, small_disk: Path) -> None:
    code, _, errors = call("run", recipe_for(), "--out", small_disk / "out")
    assert code == 2
    assert "no space left on the disk" in errors
    if (small_disk / "out" / "base").exists():
        qwlora.load_base(small_disk / "out" / "base")  # what was finished is whole
    assert not (small_disk / "out" / "adapters").exists()
    assert not (small_disk / "out" / ".qwlora" / "scratch").exists()


def test_what_must_run_first_is_a_whole_command(call: Any, recipe_for: Any, tmp_path: Path) -> None:
    recipe, out = recipe_for(), tmp_path / "an out"
    code, _, errors = call("train", recipe, "--out", out, "--set", "seed=3")
    assert code == 2
    assert errors.endswith(f"Run first: qwlora quantize {recipe} --out '{out}' --set seed=3\n")
    assert not out.exists()


def test_json_is_the_only_output(call: Any, recipe_for: Any, tmp_path: Path) -> None:
    code, out, errors = call(
        "run", recipe_for("one-layer llama"), "--out", tmp_path / "out", "--json"
    )
    assert code == 0
    assert errors == ""
    assert json.loads(out) == json.loads((tmp_path / "out" / "results.json").read_text())


def test_failed_proof_exits_with_one_and_names_the_limit(
    call: Any, recipe_for: Any, tmp_path: Path
) -> None:
    limit = ("--set", "verify.layer_mean_steps=1e-14", "--set", "verify.layer_steps=1e-14")
    recipe = recipe_for("one-layer llama")
    code, out, errors = call("run", recipe, "--out", tmp_path / "out", *limit)
    assert code == 1
    assert "limit: at most 1e-14 steps" in errors
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    # the adapter's, or the base's if the adapter's layers are equal bit for bit
    name, parity = next(p for p in results["parity"]["onnx"].items() if not p[1]["passed"])
    assert re.search(rf"export/onnx/{name}: .*simulated", errors)
    assert all(problem in errors for problem in parity["problems"])
    assert "FAIL" in out


def test_init_check_and_wrong_command_lines(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    code, out, _ = call("init", path)
    assert (code, path.exists()) == (0, True)
    assert "set model.source and data.source" in out
    code, _, errors = call("init", path)
    assert code == 2
    assert str(path) in errors
    assert "another path" in errors
    assert "recipe" not in errors.replace(str(path), "")
    code, _, errors = call("check", path)
    assert code == 2
    assert "model.source" in errors
    assert "data.source" in errors
    assert call("run", path)[0] == 2
    assert call("no-such-verb")[0] == 2


@pytest.mark.parametrize("group", [(), ("adapters",), ("encodings",)])
def test_help_shows_the_summary_of_every_command_in_full(
    call: Any, monkeypatch: pytest.MonkeyPatch, group: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call(*group, "--help")
    commands = out.partition("Commands:")[2]
    assert commands
    assert "..." not in commands


def test_check_prints_every_default(call: Any, recipe_for: Any) -> None:
    code, out, _ = call("check", recipe_for())
    assert code == 0
    assert "learning_rate: 0.0005" in out
    assert "block_size: 32" in out
