"""The command line with wrong inputs: one clear message, the right exit code, nothing half-written."""

import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from cli.command_line import answered, qwlora, refused
from conftest import byte_tokenizer
from qwlora.errors import SourceError, foreign_as, reading
from qwlora.recipe import load_recipe
from qwlora.recipe.reference import short_recipe

WRONG = {  # what the message names, by the change
    "data.source={tmp}/empty.txt": "holds no text",
    "data.source={tmp}/few.txt": "training text has 13 tokens, but one sequence needs 32",
    "model.source=/no": "model '/no' does not exist",
    "base.weights=w4-signed48": "14 of 14 layers .*q_proj.weight: .*blocks of 48",
    "model.source={tmp}/cut": "is truncated, or not a safetensors file",
    "model.source={tmp}/untold": "tokenizer",
    "model.source={tmp}/small": "but the model has only 50 tokens",
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_input_is_refused(recipe_for: Any, tmp_path: Path, change: str) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "few.txt").write_text("a few words only")
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
    for name in ("small", "cut", "untold"):
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "untold" / "tokenizer.json").unlink()
    option = f"--set={change.format(tmp=tmp_path)}"
    said = refused("run", recipe_for(), "--out", tmp_path / "out", option)
    assert re.match(rf"(?s)qwlora: .*({WRONG[change]})", said)
    assert not (tmp_path / "out").exists()


def test_an_unwritable_parent_is_refused(recipe_for, tmp_path, monkeypatch) -> None:
    access = os.access  # tests may run as root
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != tmp_path and access(p, mode))
    assert "is not writable" in refused("run", recipe_for(), "--out", tmp_path / "out")


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
    "chat a b c": ("unexpected argument b c",),
    "generate out hi --max-new-tokens x": ("--max-new-tokens", "'x'", "a whole number"),
    "merge out first --into bla": ("--into", "'bla'", "'float', 'requantized'"),
    "merge out first --into float": ("qwlora: the merged model", "--out"),
    "train . x --for tensorrt --out o": ("'tensorrt'", "llama.cpp"),
    "train . x --load_in_8bit 1": ("did you mean --set base.weights=w8-channel?",),
    "adapters add . --rank 8": ("did you mean --set rank=...?",),
    "init x.yaml --example npi": ("'npi'", "vendor"),
    "": ("Usage: qwlora", "Exit codes"),
}


@pytest.mark.parametrize("words", USAGE)
def test_wrong_arguments_are_named(words: str, tmp_path: Path) -> None:
    said = refused(*words.split(), cwd=tmp_path) if words else qwlora().stderr
    assert all(fact in said for fact in USAGE[words]), said
    assert not re.search(r"Input should|No such|Missing \w|Got unexpected|Invalid value", said)
    assert said.startswith("qwlora: " if words else "Usage: ")
    assert not [*tmp_path.iterdir()]


def test_recipe_and_directory_have_default_names(recipe_for, tmp_path, monkeypatch) -> None:
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
    assert "which this recipe lacks" in refused("quantize")
    # The job's own recipe is that of the job, whatever the current directory.
    monkeypatch.chdir(tmp_path / "out")
    assert "quantize: skipped" in qwlora("quantize").stderr


def test_a_new_recipe_asks_for_its_sources(tmp_path: Path, recipe_for: Any) -> None:
    path, npu = tmp_path / "new.yaml", tmp_path / "npu.yaml"
    assert "set model.source and data.source" in answered("init", path)
    assert "another path" in refused("init", path)
    assert re.search("(?s)model.source.*data.source", refused("check", path))
    answered("init", npu, "--example", "npu")
    assert "w4-lpbq64" in npu.read_text()
    short, full = (answered("check", recipe_for(), *options) for options in ((), ("--full",)))
    assert ("rslora" in short, "rslora" in full) == (False, True)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (RuntimeError("No space left on device (os error 28)"), "no space left"),
        (EOFError("Ran out of input"), "EOFError: Ran out"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division.*--debug"),
    ],
)
def test_an_error_names_the_file(error, problem, recipe_for, monkeypatch) -> None:
    def fail(*arguments: Any) -> None:
        with reading("weights.bin"):
            raise error

    monkeypatch.setattr("qwlora.recipe.load_recipe", fail)
    check = ("check", recipe_for())
    said = refused(*check)
    assert re.search(problem, said)
    assert "weights.bin" in said
    for words in (("--debug", *check), (*check, "--debug")):
        done = qwlora(*words)
        assert done.returncode == 2
        assert re.search("(?s)Traceback.*in fail", done.stderr)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("num_attention_heads", 0, "num_attention_heads"),
        ("vocab_size", None, ""),
        ("hidden_act", "silly", "hidden_act"),
        ("vocab_size", 3 * 10**9, "vocab_size"),
        ("dtype", "float17", "dtype"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps"),
        ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}, ""),
    ],
)
def test_impossible_configurations_name_the_model(
    recipe_for, checkpoints, tmp_path, key, value, named
) -> None:
    model = Path(shutil.copytree(checkpoints["llama"], tmp_path / "model"))
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    recipe = recipe_for(model={"source": str(model)})
    errors = refused("run", recipe, "--out", tmp_path / "out")
    assert "unexpected" not in errors
    assert str(model) in errors or "config.json" in errors
    assert named in errors
    assert not (tmp_path / "out").exists()


def test_a_library_that_exits_is_an_error() -> None:  # as mlx-lm does for OLMo
    message = "mlx-lm: SystemExit: 1"
    with pytest.raises(SourceError, match=message), foreign_as(SourceError, "mlx-lm"):
        sys.exit(1)


def test_one_command_trains_exports_and_answers(checkpoints, corpus, tmp_path) -> None:
    changes = ["data.sequence_tokens=32", "data.evaluation_sequences=2", "verify.sequences=2"]
    changes += ["adapters.0.steps=2", "adapters.0.rank=4", "preset=fast"]
    words = ["train", checkpoints["one-layer llama"], corpus, "--for", "vllm"]
    words += ["--out", tmp_path / "o", *(f"--set={change}" for change in changes)]
    done = qwlora(*words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o/export/hf" / corpus.stem / "adapter_config.json").is_file()
    written = load_recipe(tmp_path / "o/recipe.yaml")
    assert written.model_fields_set == {"model", "data", "adapters", "export", "preset", "verify"}
    assert [a.name for a in written.adapters] == [corpus.stem]
    assert done.stdout.count("prompt   ") == 2
    assert "quantize: skipped" in qwlora(*words).stderr


@pytest.mark.parametrize(
    ("model", "data", "runtime", "target", "name", "solver"),
    [
        ("m.gguf", "data/my chats.jsonl", "Ollama", "gguf", "my", "keep"),
        ("m.gguf", "python:pydoc_data.topics:topics", "vllm", "hf", "topics", None),
        ("owner/model", "owner/some.data", "mlx", "mlx", "some", None),
        ("owner/model", "../.", "qualcomm", "qairt", "first", None),
    ],
)
def test_the_recipe_follows_from_the_words(model, data, runtime, target, name, solver) -> None:
    recipe = short_recipe(model, data, runtime)
    assert recipe["export"]["targets"] == [target]
    assert recipe["adapters"] == [{"name": name}]
    assert recipe.get("base", {}).get("solver") == solver
