"""Adapters by recipe: several on one base, from an existing one, and on several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from adapter.small_models import mixture
from conftest import byte_tokenizer, tiny_model
from qwlora.adapter.adapter_folder import load_adapter
from qwlora.errors import ExportError, RecipeError, SourceError, TrainingError
from qwlora.formats.base_folder import load_base
from qwlora.pipeline.run import run
from qwlora.recipe import load_recipe

UNVERIFIED = pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning")
FAST = {"steps": 2, "warmup_steps": 0, "rank": 2}


def trains(path: Path, out: Path, *changes: str) -> dict[str, Any]:
    recipe = load_recipe(path, changes)
    names = [adapter.name for adapter in recipe.adapters]
    return run(recipe, out, ("quantize", "train"), replace=names)


def starting_from(folder: Path) -> list[dict[str, Any]]:
    """An adapter that continues one from elsewhere."""
    start = {"name": "a", "continue_from": str(folder), "unknown_base": "accept"}
    return [{**start, "steps": 1, "warmup_steps": 0}]


def test_many_kinds_of_adapter_on_one_base(recipe_for: Any, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"evaluation_steps": 1, "patience": 1, "accumulation_steps": 2},
        "rs": {"rslora": True, "compute": "bfloat16"},
        "some": {"target_modules": ["q_proj", "down_proj"], "layers": [1]},
        "slim": {"gradient_checkpointing": True, "clip": 0.5, "weight_decay": 0.1},
    }
    adapters = [{"name": name, **FAST, **kind} for name, kind in kinds.items()]
    results = trains(recipe_for(adapters=adapters), tmp_path / "out")
    for name in kinds:
        folder = tmp_path / "out" / "adapters" / name
        record = json.loads((folder / "qwlora.json").read_text())
        config = json.loads((folder / "adapter_config.json").read_text())
        assert record["base_fingerprint"] == results["base"]["fingerprint"]
        assert config["use_rslora"] == (name == "rs")
        assert config["layers_to_transform"] == ([1] if name == "some" else None)
    assert [len(results["train"][n]["losses"]) for n in ("rs", "some", "slim")] == [2, 2, 2]
    assert results["train"]["plain"]["best_step"] in (1, 2)
    assert next(step for step, _ in results["train"]["plain"]["evaluations"]) == 1


def test_adapter_starts_from_another(recipe_for: Any, tmp_path: Path) -> None:
    trains(recipe_for(adapters=[{"name": "first", **FAST}]), tmp_path / "out")
    first = tmp_path / "out" / "adapters" / "first"
    adapters = [
        {"name": "first", **FAST},
        {"name": "second", "continue_from": str(first), "steps": 2, "warmup_steps": 0},
        {"name": "same", "continue_from": str(first), "steps": 0},
    ]
    results = trains(recipe_for(adapters=adapters), tmp_path / "out")
    folders = (first.with_name(name) for name in ("first", "second", "same"))
    weights, further, same = (load_file(f / "adapter_model.safetensors") for f in folders)
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())
    assert not all(torch.equal(further[name], weight) for name, weight in weights.items())
    assert results["train"]["same"]["steps"] == 0
    assert results["train"]["second"]["losses"][0] < results["train"]["first"]["losses"][0]


PARTS = [{"name": part, "target_parameters": [f"x.{part}"]} for part in ("up", "down")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (".0.continue_from=/not/there", ".continue_from: adapter '/not/there' does not exist"),
        ("=[{name: a, continue_from: a/b, rank: 4, dora: true}]", ": dora, rank: "),
        ("=[{name: a, steps: 0}]", ": steps is 0"),
        ("=[{name: a, rank_pattern: {'*.down_proj': 8, 'mlp.(up': 2}}]", "'mlp.(up' is not a reg"),
        (".0.target_modules='*.down_proj'", "_modules: '*.down_proj' is not a regular expression"),
        (
            "=[{name: a, target_parameters: [up], dropout: 0.1, dora: true, layers: [0]}]",
            ": dropout, dora, layers: PEFT",
        ),
        ("=[{name: a, patience: 2}]", ": patience needs evaluations"),
        (f"={PARTS}", "base_activations adapter_only: PEFT can load several adapters only"),
        ("=[{name: one, continue_from: two}, {name: two}]", "one continues two, which is listed"),
        (
            "=[{name: one, mergeable: true}, {name: two, continue_from: one}]",
            "two continues one, which is mergeable",
        ),
    ],
)
def test_recipe_problems_are_found_first(recipe_for: Any, change: str, message: str) -> None:
    changes = (f"adapters{change}", "simulation.base_activations=adapter_only")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_for(), changes)
    assert message in "\n".join(caught.value.problems)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture
def mixtral(tmp_path: Path, recipe_for: Any) -> Any:
    """Writes a recipe for a model of two layers with four experts each."""
    mixture(layers=2).save_pretrained(tmp_path / "mixtral")
    byte_tokenizer().save_pretrained(tmp_path / "mixtral")
    model, base = {"source": str(tmp_path / "mixtral")}, {"weights": "w4-signed16"}
    return lambda adapters: recipe_for(model=model, base=base, adapters=adapters)


def test_fused_experts_get_adapters(mixtral: Any, tmp_path: Path) -> None:
    some = {**FAST, "target_modules": ["q_proj"], "target_parameters": EXPERTS}
    adapters = [
        {"name": "some", **some, "rank_pattern": {"down_proj": 3}},
        {"name": "further", "continue_from": "some", "steps": 1, "warmup_steps": 0},
    ]
    trains(mixtral(adapters), tmp_path / "out")
    for folder in (tmp_path / "out" / "adapters" / name for name in ("some", "further")):
        factors = load_file(folder / "adapter_model.safetensors")
        shapes = {n.partition("layers.0.")[2]: list(t.shape) for n, t in factors.items()}
        shapes.pop("", None)  # of the other layer
        assert shapes == {
            # gate_up_proj: two ranks for each of four experts
            "mlp.experts.base_layer.lora_A.weight": [8, 32],
            "mlp.experts.base_layer.lora_B.weight": [128, 8],
            "mlp.experts.lora_A.weight": [12, 64],
            "mlp.experts.lora_B.weight": [32, 12],
            "self_attn.q_proj.lora_A.weight": [2, 32],
            "self_attn.q_proj.lora_B.weight": [32, 2],
        }
    plain, base = (load_base(tmp_path / "out" / "base") for _ in "01")
    adapted, ids = load_adapter(base, folder.parent / "some"), torch.arange(20)[None]
    assert not torch.equal(adapted(ids).logits, plain(ids).logits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target_modules": ["q_proj", "qproj"]}, "target_modules 'qproj'"),
        ({"target_parameters": [EXPERTS[0], "experts.down_prj"]}, "'experts.down_prj'.*down_proj"),
        ({"target_parameters": ["self_attn.k_proj.weight"]}, "k_proj.weight belongs to a layer"),
        ({"target_parameters": ["input_layernorm.weight"]}, "1 dimensional Parameter"),
    ],
)
def test_wrong_modules_and_experts_write_nothing(
    mixtral: Any, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    path = mixtral([{**FAST, "name": "a", "target_modules": ["q_proj"], **wrong}])
    with pytest.raises(TrainingError, match=f"adapter a: .*{message}"):
        trains(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def save_start(path: Path, architecture: str, **more: Any) -> None:
    """An adapter from elsewhere."""
    config = LoraConfig(r=2, target_modules=["q_proj"], **more)
    model = get_peft_model(tiny_model(architecture), config)
    model.save_pretrained(str(path), save_embedding_layers=False)


@UNVERIFIED
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("where", ["quantize", "base", "keep"])
def test_refuses_a_start_that_saves_packed_layers(
    recipe_for: Any, tmp_path: Path, where: str
) -> None:
    save_start(tmp_path / "start", "llama", modules_to_save=["embed_tokens"])
    path = recipe_for(adapters=starting_from(tmp_path / "start"))
    packed = "base.rules=[{match: lm_head, weights: w8-signed32}]"
    if where != "quantize":
        run(load_recipe(path, (packed,)), tmp_path / "out", ("quantize",))
    changes, out = (packed,), tmp_path / "out"
    if where == "keep":
        changes, out = (f"model.source={out / 'base'}", "base.solver=keep"), tmp_path / "kept"
    before = sorted(tmp_path.rglob("*"))
    message = r"adapter a: .*_to_save hold .*embed_tokens as floats.*{match: .*embed_tokens, "
    with pytest.raises(SourceError, match=message):
        run(load_recipe(path, changes), out, ("quantize", "train")[where == "base" :])
    assert sorted(tmp_path.rglob("*")) == before


@UNVERIFIED
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"modules_to_save": ["lm_head"]}, r"lm_head\.weight"),
        ({"use_dora": True}, "magnitude"),
        ({"lora_bias": True}, r"lora_B\.bias"),
    ],
)
def test_what_cannot_be_switched_is_refused_before_training(
    recipe_for: Any, tmp_path: Path, given: dict[str, Any], found: str
) -> None:
    save_start(tmp_path / "start", "qwen3", **given)
    path = recipe_for("qwen3", adapters=starting_from(tmp_path / "start"))
    rules = "base.rules=[{match: lm_head, keep: float}]"
    message = rf"target (onnx|genai): adapter a has .*{found}.* LoRA factors"
    for targets in ("[onnx]", "[genai, onnx_each]"):
        with pytest.raises(ExportError, match=message):
            run(load_recipe(path, (rules, f"export.targets={targets}")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@UNVERIFIED
def test_start_that_saves_float_layers_is_trained_further(recipe_for: Any, tmp_path: Path) -> None:
    save_start(tmp_path / "start", "qwen3", modules_to_save=["lm_head"])
    path = recipe_for("qwen3", adapters=starting_from(tmp_path / "start"))
    rules = "base.rules=[{match: lm_head, keep: float}, {match: '*_head', weights: w8-signed32}]"
    with pytest.raises(SourceError, match="does not say which base"):
        trains(path, tmp_path / "out", rules, "adapters.0.unknown_base=refuse")
    assert not (tmp_path / "out").exists()
    trains(path, tmp_path / "out", rules, "export.targets=[onnx_each]")
    names = load_file(tmp_path / "out" / "adapters" / "a" / "adapter_model.safetensors")
    assert any("lm_head.weight" in name for name in names)


def started(launcher: list[str], program: list[str]) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = str(Path(__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = ":".join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", *[a.replace("PORT", str(port)) for a in launcher], *program]
    options = {"capture_output": True, "text": True, "check": False, "timeout": 1800}
    return subprocess.run(command, env=environment, **options)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2", "--master-port=PORT"],
    "accelerate": [
        *("accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"),
        *("--main_process_port=PORT", "--mixed_precision=no"),
    ],
}
DISTRIBUTED = {
    **{"name": "first", "rank": 4, "steps": 6, "warmup_steps": 1, "batch_sequences": 4},
    **{"learning_rate": 5e-3, "evaluation_steps": 3, "compute": "float32", "init": "qera"},
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_do_the_work_of_one(recipe_for: Any, tmp_path: Path, launcher: str) -> None:
    path = recipe_for("one-layer llama", base={"solver": "gptq"}, adapters=[DISTRIBUTED])
    run(load_recipe(path), tmp_path / "one")
    program = ["-m", "qwlora", "run", str(path), "--out", str(tmp_path / "two")]
    result = started(LAUNCHERS[launcher], program)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("quantize: done") == 1  # only the first process prints and writes
    folders = (tmp_path / name for name in ("one", "two"))
    one, two = (json.loads((folder / "results.json").read_text()) for folder in folders)
    folders = (tmp_path / name / "adapters" / "first" for name in ("one", "two"))
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert a.keys() == b.keys()
    # AdamW divides by the gradient's size, which passes rounding on to small entries
    difference = max(float((a[n] - b[n]).abs().max()) for n in a)
    moved = max(float(t.abs().max()) for n, t in a.items() if "lora_B" in n)
    assert difference < 1e-3 * moved
    losses = [found["train"]["first"]["losses"] for found in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for key, score in {"kl": "mean", "top1": "share", "perplexity_ratio": "value"}.items():
        expected = one[key]["base"][score]
        assert two[key]["base"][score] == pytest.approx(expected, rel=1e-3), key
