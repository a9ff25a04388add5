"""Jobs that export the base once and adapters beside it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cli.command_line import qwlora
from conftest import byte_tokenizer, reseal
from export.client_programs import with_clients
from qwlora import load_adapter, load_base
from qwlora.errors import (
    FingerprintError,
    GridError,
    QwloraWarning,
    RecipeError,
    SourceError,
    TrainingError,
    VerificationError,
)
from qwlora.export.proof.checks import is_so
from qwlora.export.proof.folder import (
    current_proofs,
    proofs,
    record_digest,
    verify_bundle,
    write_record,
)
from qwlora.export.proof.readme import write_readme
from qwlora.export.registry import TARGETS
from qwlora.pipeline.commands.manage_adapters import remove_adapter, rename_adapter
from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.job.job_texts import JobTexts
from qwlora.pipeline.plan.plan import make_plan, resolve_compute
from qwlora.pipeline.plan.stage import VERBS
from qwlora.pipeline.plan.stale_stages import find_stale
from qwlora.pipeline.running.run_job import run
from qwlora.recipe import load_recipe
from qwlora.system.atomic import files_in, read_tensors
from simulation.tiny_architectures import make

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
        assert folders == {"base", "first", "second", "proof", "README.md"}
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


def test_the_bundle_of_a_renamed_adapter_is_proven_as_before(job: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(job, tmp_path / "job"))
    rename_adapter(copy, "first", "one")
    bundle = copy / "export" / "hf"
    assert proofs(bundle).keys() == current_proofs(bundle).keys() == {"one", "second"}
    assert not any(proof["problems"] for proof in verify_bundle(bundle).values())
    recipe = resolve_compute(load_recipe(copy / "recipe.yaml"))
    assert not find_stale(make_plan(recipe, JobTexts(recipe)), Directory.read(copy))


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
        ({"name": "base"}, "base is the name of another file or folder in export/hf"),
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


@pytest.mark.parametrize(
    ("architecture", "target", "message"),
    [
        ("gpt2", "hf", r"target hf cannot hold .*gpt2.*Conv1D.*c_attn\.weight"),
        pytest.param(
            "opt",
            "mlx",
            "target mlx cannot hold .*mlx-lm has no model type opt",
            marks=pytest.mark.client,
        ),
    ],
)
def test_a_model_that_a_target_cannot_hold_is_refused_before_anything_is_computed(
    recipe_for: Any, tmp_path: Path, architecture: str, target: str, message: str
) -> None:
    recipe = load_recipe(recipe_for(architecture, export={"targets": [target]}))
    with pytest.raises(GridError, match=message):
        run(recipe, tmp_path / "job", ("quantize",))
    assert not (tmp_path / "job" / "base").exists()


def test_an_adapter_that_peft_puts_on_experts_is_refused_before_anything_is_computed(
    recipe_for: Any, tmp_path: Path
) -> None:
    """`all-linear` of a mixture of experts includes them."""
    make("Mixtral").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = {"source": str(tmp_path / "model")}
    recipe = load_recipe(recipe_for(model=model, export={"targets": ["openvino"]}))
    with pytest.raises(TrainingError, match=r"adapter first changes .*experts.*openvino holds"):
        run(recipe, tmp_path / "job", VERBS)
    assert not (tmp_path / "job" / "base").exists()


def bundle(job: Path, folder: Path, target: str = "hf") -> Path:
    """The bundle alone, somewhere else, without the job that made it."""
    return Path(shutil.copytree(job / "export" / target, folder / "moved"))


def test_a_moved_bundle_is_proven_without_the_job(job: Path, tmp_path: Path) -> None:
    moved = bundle(job, tmp_path)
    done = qwlora("verify", moved, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"first", "second"}
    for name, proof in found.items():
        assert proof["passed"]
        exact, recorded = proof["figures"]["exact"], proofs(moved)[name]["figures"]["exact"]
        for state in ("base", "adapter"):
            assert exact[state]["max_log_prob_difference"] <= 1e-4
            assert exact[state]["kl_divergence"] < 1e-6
            assert exact[state]["perplexity"] == pytest.approx(exact[state]["reference_perplexity"])
            assert recorded[state]["sequences"] == 2
        assert exact["off_is_equal"]
        assert exact["decode_agreement"] == 1
        assert min(exact["prefill_tokens_per_second"], exact["decode_tokens_per_second"]) > 0
        assert proof["client"]["compressed-tensors"]
        assert proof["figures"]["bytes"]["base"] > proof["figures"]["bytes"]["adapter"] > 0
    results = json.loads((job / "results.json").read_text())
    assert results["parity"]["hf"]["first"]["proof"]["exact"]["base"]["top1_agreement"] == 1


def test_the_reference_is_what_the_trained_model_says(job: Path) -> None:
    reference, _ = read_tensors(
        job / "export" / "hf" / "proof" / "second" / "reference.safetensors"
    )
    model = load_adapter(load_base(job / "base"), job / "adapters" / "second").eval()
    ids = reference["ids"][:1]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    expected = logits.log_softmax(-1)[0].topk(64)
    torch.testing.assert_close(reference["adapter.log_probs"][0], expected.values)
    assert torch.equal(reference["adapter.top"][0].long(), expected.indices)


def test_one_changed_bit_in_any_file_of_a_bundle_is_refused(job: Path, tmp_path: Path) -> None:
    moved = bundle(job, tmp_path)
    files = [path for path in files_in(moved) if path != "README.md"]
    assert {"base/model.safetensors", "first/adapter_model.safetensors"} <= set(files)
    for name in files:
        content = (moved / name).read_bytes()
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 1
        (moved / name).write_bytes(changed)
        with pytest.raises((FingerprintError, SourceError)):
            verify_bundle(moved)
        (moved / name).write_bytes(content)
    (moved / "base" / "added.json").write_text("{}")
    with pytest.raises(FingerprintError, match=r"added\.json"):
        verify_bundle(moved)


@pytest.mark.parametrize("added", ["notes.txt", "third/x", "proof/x", "proof/first/x"])
def test_a_file_without_a_proof_is_refused(added: str, job: Path, tmp_path: Path) -> None:
    moved = bundle(job, tmp_path)
    (moved / ".gitattributes").write_text("added by a download")
    (moved / added).parent.mkdir(exist_ok=True)
    (moved / added).write_text("x")
    with pytest.raises(FingerprintError, match=rf"{re.escape(added.split('/')[-1])}|third"):
        verify_bundle(moved)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "no JSON object"),
        ('{"format": 2}', "format 2, not 1"),
        ('{"format": 1, "of": {}}', "no limits.perplexity_difference"),
        ('{"format": 1, "limits": {"perplexity_difference": 1}}', "no of"),
        ('{"format": 1, "of": {}, "limits": {"perplexity_difference": NaN}}', "difference nan"),
        ('{"format": 1, "of": {}, "limits": {"perplexity_difference": 1e9}}', "up to 1"),
        ('{"format": 1, "of": {}, "limits": {"perplexity_difference": true}}', "difference True"),
        ('{"format": 1, "of": {}, "limits": {"perplexity_difference": "1"}}', "no limits"),
    ],
)
def test_a_damaged_proof_is_named_and_does_not_block_the_job(
    content: str, said: str, job: Path, tmp_path: Path
) -> None:
    moved = bundle(job, tmp_path)
    path = moved / "proof" / "first" / "proof.json"
    path.write_text(content)
    with pytest.raises(SourceError, match=rf"first/proof\.json' .*{said}"):
        verify_bundle(moved)
    assert current_proofs(moved, without="first").keys() == {"second"}
    with pytest.warns(QwloraWarning, match=rf"leaves out adapter first: .*{said}"):
        assert current_proofs(moved, without="second") == {}


def test_an_edited_readme_is_kept(job: Path, tmp_path: Path) -> None:
    moved = bundle(job, tmp_path)
    readme, records = moved / "README.md", proofs(moved)
    written = readme.read_text()
    readme.write_text("\n".join(written.splitlines()[:-1]) + "\nMine.\n")
    edited = readme.read_text()
    write_readme(moved, records)
    assert readme.read_text() == edited
    readme.write_text(f"Mine.\n{written}")
    write_readme(moved, records)
    assert readme.read_text() == written


def test_a_readme_names_only_adapters_that_are_proven_on_the_files_that_are_there(
    job: Path, tmp_path: Path
) -> None:
    moved = bundle(job, tmp_path)
    assert current_proofs(moved).keys() == {"first", "second"}
    write_record(moved / "second", {"base_fingerprint": "another"})
    assert current_proofs(moved).keys() == {"first"}
    write_record(moved / "base", {"base_fingerprint": "another"})
    assert current_proofs(moved) == {}
    write_readme(moved, {})
    assert not (moved / "README.md").exists()


def readme_lines(job: Path) -> list[tuple[str, str]]:
    """What README.md of target hf says about adapters: folders, and verdicts."""
    text = (job / "export" / "hf" / "README.md").read_text()
    return re.findall(r"^(?:\| `(\w+)/`|- (\w+: \w+))", text, re.MULTILINE)


def test_a_readme_follows_adapters_that_are_renamed_and_removed(job: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(job, tmp_path / "job"))
    rename_adapter(copy, "first", "one")
    both = [("base", ""), ("one", ""), ("second", ""), ("", "one: passed"), ("", "second: passed")]
    assert readme_lines(copy) == both
    moved = copy / "export" / "hf"
    assert proofs(moved)["one"]["adapter"] == "one"
    assert verify_bundle(moved)["one"]["passed"]
    remove_adapter(copy, "second")
    assert readme_lines(copy) == [("base", ""), ("one", ""), ("", "one: passed")]


def test_a_readme_says_what_failed_beyond_the_proof(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(job, tmp_path / "job"))
    broken = [is_so("switching back", False)]
    monkeypatch.setattr("qwlora.export.proof.measure.switching", lambda *_: broken)
    recipe = load_recipe(copy / "recipe.yaml", ("verify.sequences=1",))
    with pytest.raises(VerificationError, match="switching back: no"):
        run(recipe, copy, VERBS)
    text = (copy / "export" / "hf" / "README.md").read_text()
    assert "- first: FAILED; switching back: no on " in text
    assert "- second: passed" in text
    remove_adapter(
        copy, "second"
    )  # README.md is written again, from proofs of adapters that passed
    assert not (copy / "export" / "hf" / "README.md").exists()


def test_a_base_or_an_adapter_of_another_bundle_is_refused(job: Path, tmp_path: Path) -> None:
    moved = bundle(job, tmp_path)
    (moved / "first").rename(tmp_path / "kept")
    shutil.copytree(moved / "second", moved / "first")
    done = qwlora("verify", moved)
    assert done.returncode == 2
    assert "first' is not the one that the proof" in done.stderr
    shutil.rmtree(moved / "first")
    (tmp_path / "kept").rename(moved / "first")
    (moved / "base" / "qwlora.json").write_text((moved / "first" / "qwlora.json").read_text())
    assert qwlora("verify", moved).returncode == 2


@pytest.mark.parametrize("target", ["hf", "mlx"])
def test_adapters_that_were_swapped_with_their_proofs_are_refused(
    target: str, job: Path, tmp_path: Path
) -> None:
    moved = bundle(job, tmp_path, target)
    for folder in (moved, moved / "proof"):
        (folder / "first").rename(folder / "other")
        (folder / "second").rename(folder / "first")
        (folder / "other").rename(folder / "second")
    with pytest.raises(FingerprintError, match="proof/first is the proof of adapter 'second'"):
        verify_bundle(moved)


def test_a_sealed_bundle_that_names_code_is_refused(job: Path, tmp_path: Path) -> None:
    """Whoever changes a file can change every digest too."""
    moved = bundle(job, tmp_path)
    config = moved / "base" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "auto_map": {"AutoModelForCausalLM": "a--b.C"}}))
    reseal(moved / "base", "qwlora.json")
    for name in ("first", "second"):
        path = moved / "proof" / name / "proof.json"
        proof = json.loads(path.read_text())
        proof["of"]["base"] = record_digest(moved / "base")
        path.write_text(json.dumps(proof))
        reseal(path.parent, path.name)
    done = qwlora("verify", moved)
    assert done.returncode == 2
    assert re.search(r"config\.json.*auto_map.* names code to load", done.stderr)


EVERYWHERE = [  # gguf needs a model from a GGUF file
    name for name, kind in TARGETS.items() if not kind.is_simulated and name != "gguf"
]


@pytest.fixture
def everywhere(recipe_for: Any, finished: Path) -> Path:
    """A job for every runtime that is installed; made once."""
    if not (finished / "everywhere").exists():
        targets = [name for name in EVERYWHERE if TARGETS[name].missing() is None]
        recipe = recipe_for(
            base={"weights": "w4-block32", "solver": "search"},
            export={"targets": targets},
            adapters=ADAPTERS,
        )
        run(load_recipe(recipe), finished / "everywhere", VERBS)
    return finished / "everywhere"


@pytest.mark.parametrize("name", with_clients(EVERYWHERE))
def test_the_bundle_of_every_runtime_is_proven_elsewhere_and_refused_after_a_changed_bit(
    name: str, everywhere: Path, tmp_path: Path
) -> None:
    moved = bundle(everywhere, tmp_path, name)
    gone = everywhere.rename(everywhere.with_name("gone"))
    try:
        done = qwlora("verify", moved, "--json")
        assert done.returncode == 0, done.stderr
        for proof in json.loads(done.stdout).values():
            assert proof["passed"]
            assert proof["figures"]["exact"]["off_is_equal"]
        for file in files_in(moved):
            content = (moved / file).read_bytes()
            for place in {0, len(content) // 2, len(content) - 1}:
                changed = bytearray(content)
                changed[place] ^= 1
                (moved / file).write_bytes(changed)
                if file != "README.md":
                    with pytest.raises((FingerprintError, SourceError)):
                        verify_bundle(moved)
            (moved / file).write_bytes(content)
    finally:
        gone.rename(everywhere)


def test_a_bundle_that_computes_something_else_fails(job: Path, tmp_path: Path) -> None:
    """Every digest is right, as after an attack or a bug of the exporter."""
    moved = bundle(job, tmp_path)
    shutil.copytree(moved / "second", moved / "first", dirs_exist_ok=True)
    proof = json.loads((moved / "proof" / "first" / "proof.json").read_text())
    proof["of"]["adapter"] = record_digest(moved / "first")
    (moved / "proof" / "first" / "proof.json").write_text(json.dumps(proof))
    reseal(moved / "proof" / "first", "proof.json")
    done = qwlora("verify", moved)
    assert done.returncode == 1
    assert "first: largest difference of a log-probability with the adapter" in done.stderr
    assert "| second | exact |" in done.stdout


def test_the_readme_of_a_bundle_runs(job: Path, tmp_path: Path) -> None:
    for target, packages in (("hf", ["compressed_tensors"]), ("mlx", ["mlx_lm"])):
        moved = bundle(job, tmp_path / target, target)
        text = (moved / "README.md").read_text()
        assert "first" in text
        assert "w4-block32" in text
        assert "whose files do not state one" in text  # of the tiny model's license
        if any(importlib.util.find_spec(package) is None for package in packages):
            assert "written, not run" in text
            continue
        assert "| first | exact |" in text
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            with contextlib.chdir(moved):
                exec(code, {})


def test_verify_without_a_job_or_a_bundle_says_what_it_needs(tmp_path: Path) -> None:
    done = qwlora("verify", tmp_path)
    assert done.returncode == 2
    assert "--out" in done.stderr
    assert "base and proof" in done.stderr
