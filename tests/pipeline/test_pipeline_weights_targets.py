"""Jobs that export the base once and adapters beside it."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.command_line import answered
from conftest import write_recipe
from qwlora import load_adapter, load_base
from qwlora.errors import FingerprintError, RecipeError, SourceError
from qwlora.formats.model_source import load_model
from qwlora.pipeline import VERBS
from qwlora.pipeline.commands.manage_adapters import remove_adapter, rename_adapter
from qwlora.pipeline.job import OpenJob, job_recipe
from qwlora.pipeline.run import run
from qwlora.pipeline.store import STAGE
from qwlora.recipe import load_recipe
from qwlora.system.atomic import files_in, read_tensors
from qwlora.targets.proof.canary import likeliest, margin, read_canaries
from qwlora.targets.proof.folder import current_proofs, proofs
from qwlora.targets.proof.prove import verify_bundle
from qwlora.targets.registry import TARGETS
from targets.client_programs import with_clients

ADAPTERS = [
    {"name": name, "rank": rank, "steps": 4, "warmup_steps": 1, "rslora": rank == 3}
    for name, rank in (("first", 2), ("second", 3))
]


@pytest.fixture(scope="module")
def finish(tmp_path_factory: Any, checkpoints: dict[str, Path], corpus: Path) -> Any:
    """Run a job of a tiny Llama for these targets."""

    def run_job(weights: str, *targets: str) -> Path:
        folder = tmp_path_factory.mktemp("job")
        sections: Any = {"adapters": ADAPTERS, "export": {"targets": targets}}
        sections["base"] = {"weights": weights, "solver": "search"}
        recipe = write_recipe(folder, checkpoints["one-layer llama"], corpus, **sections)
        run(load_recipe(recipe), folder / "job", VERBS)
        return folder / "job"

    return run_job


EVERYWHERE = [n for n, kind in TARGETS.items() if not kind.is_simulated and n != "executorch"]


@pytest.fixture(scope="module")
def job(finish: Any) -> Path:
    """A job for hf, mlx, and every runtime that is installed."""
    installed = {name for name in EVERYWHERE if TARGETS[name].missing() is None}
    return Path(finish("w4-block32", *sorted({"hf", "mlx"} | installed)))


def bundle(job: Path, folder: Path, target: str = "hf") -> Path:
    """The bundle alone, somewhere else, without the job that made it."""
    return Path(shutil.copytree(job / "export" / target, folder / "moved"))


@pytest.mark.client
def test_a_job_for_executorch_is_proven(finish: Any, tmp_path: Path) -> None:
    moved = bundle(finish("w4-bf16block32", "executorch"), tmp_path, "executorch")
    assert " without rounding), " in (moved / "README.md").read_text()
    for proof in json.loads(answered("verify", moved, "--json")).values():
        assert proof["passed"]


MLP_IN_8_BITS = "base.rules=[{match: '*.mlp.*', weights: w8-block32-asymmetric}]"
TWO_GRIDS = ("base.weights=w4-block32-asymmetric", MLP_IN_8_BITS)


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("hf", ("adapters.0.dora=true",), "target hf: adapter first has DoRA.*LoRA factors"),
        ("hf", ("adapters.0.name=Base",), "target hf: adapter Base has the name of another file"),
        ("mlx", ("base.weights=w7-block32",), "target mlx: base.weights: int7"),
        ("hf", TWO_GRIDS, "int4 asymmetric.*, int8 asymmetric.* together"),
    ],
)
def test_what_a_target_cannot_hold_is_refused_at_once(recipe_for, target, changes, message) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_for(export={"targets": [target]}), changes)


def test_canaries_are_what_transformers_computes(job: Path) -> None:
    canaries = read_canaries(job / "export/hf")
    assert canaries == read_canaries(job / "export/mlx")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(job / "export/hf/base", dtype="float32"),
        job / "export/hf/first",
        adapter_name="first",
    ).eval()
    model.load_adapter(job / "export/hf/second", "second")
    for name, canary in canaries.items():
        assert len(canary.contexts) == 160  # the tokenizer has no chat template
        with model.disable_adapter() if name == "base" else nullcontext():
            if name != "base":
                model.set_adapter(name)
            for context, answer in zip(canary.contexts, canary.answers, strict=True):
                with torch.no_grad():
                    logits = model(torch.tensor([context.tokens])).logits[0, -1]
                found = logits.log_softmax(-1)[[*answer]]
                assert found.tolist() == pytest.approx([*answer.values()], abs=1e-3)
                assert likeliest(answer) == int(logits.argmax()) or margin(answer) < 1e-3


def test_where_the_contexts_come_from(recipe_for: Any, corpus: Path, tmp_path: Path) -> None:
    sections: Any = {"export": {"targets": ["hf"]}, "adapters": ADAPTERS[:1]}
    recipe = recipe_for("one-layer llama", **sections)
    run(load_recipe(recipe, ("export.canary=held_out",)), tmp_path / "job", VERBS)
    held_out = read_canaries(tmp_path / "job/export/hf")["base"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "job/base")
    texts = "".join(path.read_text() for path in corpus.rglob("*") if path.is_file())
    pieces = tokenizer.convert_ids_to_tokens(held_out.contexts[0].tokens)
    assert "".join(pieces).replace("Ġ", " ") in texts
    done = json.loads(answered("run", tmp_path / "job", "--set=export.canary=none", "--json"))
    assert not [*(tmp_path / "job").glob("export/*/*/canary.json")]
    assert done["parity"]["hf"]["first"]["passed"]


def test_a_moved_bundle_is_proven_without_the_job(job: Path, tmp_path: Path) -> None:
    moved = bundle(job, tmp_path)
    found = json.loads(answered("verify", moved, "--json"))
    assert found.keys() == {"first", "second"}
    for name, proof in found.items():
        exact, recorded = proof["figures"]["exact"], proofs(moved)[name]["figures"]["exact"]
        for state in ("base", "adapter"):
            assert exact[state]["max_log_prob_difference"] <= 1e-4
            assert exact[state]["kl_divergence"] < 1e-6
            assert exact[state]["perplexity"] == pytest.approx(exact[state]["reference_perplexity"])
            assert recorded[state]["sequences"] == 2
        assert exact["decode_agreement"] == 1
        assert proof["figures"]["bytes"]["base"] > proof["figures"]["bytes"]["adapter"] > 0
    results = json.loads((job / "results.json").read_text())
    assert results["parity"]["hf"]["first"]["proof"]["exact"]["base"]["top1_agreement"] == 1
    for name in ("first", "second"):
        assert results["parity"]["hf"][name]["passed"]
        if missing := TARGETS["mlx"].missing():
            assert results["parity"]["mlx"][name] == {"not_run": missing}
        else:
            assert results["parity"]["mlx"][name]["passed"]
    files, floats = results["export"]["hf"]["base"], load_model(str(job_recipe(job).model.source))
    count = sum(p.numel() for p in floats.parameters())
    assert files["bits_per_weight"] == pytest.approx(8 * files["bytes"] / count)
    assert files["bits_per_weight"] > results["base"]["bits_per_weight"]  # embeddings, too


def test_the_reference_is_what_the_trained_model_says(job: Path) -> None:
    reference, _ = read_tensors(job / "export/hf/proof/second/reference.safetensors")
    model = load_adapter(load_base(job / "base"), job / "adapters" / "second").eval()
    ids = reference["ids"][:1]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    expected = logits.log_softmax(-1)[0].topk(64)
    torch.testing.assert_close(reference["adapter.log_probs"][0], expected.values)
    assert torch.equal(reference["adapter.top"][0].long(), expected.indices)


def test_held_out_text_leaves_the_job_only_if_asked_for(job, tmp_path, corpus) -> None:
    """Figures of the job are of held-out text, whatever ships."""
    copy = Path(shutil.copytree(job, tmp_path / "job"))
    folder, parities = copy / "export/hf", []
    file = folder / "proof/first/reference.safetensors"
    tokenizer = AutoTokenizer.from_pretrained(copy / "base")
    source = "".join(path.read_text() for path in corpus.iterdir())
    for text in ("held_out", "none", "generated"):
        recipe = load_recipe(copy / "recipe.yaml", ("export.targets=[hf]", f"export.proof={text}"))
        found = run(recipe, copy, VERBS)["parity"]["hf"]["first"]
        parities.append({key: found[key] for key in ("perplexity", "tokens", "kl_divergence")})
        assert file.exists() == (text != "none")
        if text == "none":
            with pytest.raises(SourceError, match="has no text"):
                verify_bundle(folder)
            continue
        assert not any(proof["problems"] for proof in verify_bundle(folder).values())
        ids = read_tensors(file)[0]["ids"]
        words = tokenizer.decode(ids[0, 1:13]).replace(" ", "").replace("Ġ", " ")
        assert (words in source) == (text == "held_out")
    assert parities[0] == parities[1] == parities[2]
    before, _ = read_tensors(job / "export/hf/proof/first/reference.safetensors")
    assert torch.equal(ids, before["ids"])  # generated again


def test_a_bundle_follows_adapters_that_are_renamed_and_removed(job: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(job, tmp_path / "job"))
    moved = copy / "export" / "hf"
    rename_adapter(copy, "first", "one")
    assert proofs(moved)["one"]["adapter"] == "one"
    assert proofs(moved).keys() == current_proofs(moved).keys() == {"one", "second"}
    assert not any(proof["problems"] for proof in verify_bundle(moved).values())
    assert not OpenJob(copy).judge.stale
    remove_adapter(copy, "second")
    readme = (moved / "README.md").read_text()
    assert re.findall(r"^- (\w+: \w+)", readme, re.MULTILINE) == ["one: passed"]


@pytest.mark.parametrize("name", with_clients(EVERYWHERE))
def test_a_changed_bit_of_any_bundle_is_refused(name: str, job: Path, tmp_path: Path) -> None:
    moved = bundle(job, tmp_path, name)
    gone = job.rename(job.with_name("gone"))
    try:
        for proof in json.loads(answered("verify", moved, "--json")).values():
            assert proof["passed"]
            assert proof["figures"]["exact"]["off_is_equal"]
        for file in files_in(moved):
            content = (moved / file).read_bytes()
            for place in {0, len(content) // 2, len(content) - 1}:
                changed = bytearray(content)
                changed[place] ^= 1
                (moved / file).write_bytes(changed)
                if Path(file).name not in ("README.md", STAGE):  # for people, and for the job
                    with pytest.raises((FingerprintError, SourceError)):
                        verify_bundle(moved)
            (moved / file).write_bytes(content)
    finally:
        gone.rename(job)
