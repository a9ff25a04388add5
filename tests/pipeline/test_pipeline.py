"""The whole job on tiny models: every architecture, what is skipped, what is run again, what survives an interruption."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from cli.command_line import answered, qwlora
from conftest import ARCHITECTURES, Job, byte_tokenizer, flip_bit, text, tiny_model, write_recipe
from qwlora import load_adapter, load_simulation
from qwlora.errors import FingerprintError, SourceError
from qwlora.formats.aimet_encodings import EncodingsFile, write_encodings
from qwlora.formats.aimet_encodings.grids import entry_of
from qwlora.formats.base_folder import load_base
from qwlora.grid.encoding import measure
from qwlora.grid.scheme import PerChannel, Scheme
from qwlora.nn import packed_weights
from qwlora.pipeline import VERBS
from qwlora.pipeline.stages import file_stages
from qwlora.recipe import load_recipe
from qwlora.recipe.yaml_core import load_yaml
from qwlora.system.parameter_names import canonical_name, is_adapter_name
from qwlora.targets.proof.checks import Limits
from qwlora.targets.proof.prove import verify_bundle

pytestmark = pytest.mark.usefixtures("shared_captures")
OTHERS = [architecture for architecture in ARCHITECTURES if architecture != "llama"]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Callable[[str], Path]:
    """The finished run of an architecture."""

    @cache
    def finished(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        tiny_model(architecture, layers=1).save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
        first = {"name": "first", "rank": 4, "steps": 6, "warmup_steps": 1, "learning_rate": 5e-3}
        sections = {"preset": "balanced", "adapters": [first]}
        sections["data"] = {"source": str(corpus), "sequence_tokens": 32}
        sections["verify"] = {"sequences": 4}
        recipe = write_recipe(folder, folder / "model", corpus, **sections)
        printed = json.loads(answered("run", recipe, "--out", folder / "out", "--json"))
        assert printed == json.loads((folder / "out" / "results.json").read_text())
        return folder / "out"

    return finished


@pytest.fixture(params=["llama", *(pytest.param(a, marks=pytest.mark.slow) for a in OTHERS)])
def finished(run_of: Callable[[str], Path], request: pytest.FixtureRequest) -> Path:
    return run_of(request.param)


def test_results_hold_the_contract(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    perplexity = results["perplexity"]
    assert perplexity["adapted"]["first"] < perplexity["base"]
    adapted = pytest.approx(perplexity["adapted"]["first"], rel=0.01)
    assert perplexity["simulated"]["first"] == adapted
    parity = results["parity"]["onnx"]["first"]
    assert parity["perplexity"] == pytest.approx(parity["reference_perplexity"], rel=0.003)
    assert parity["top1_agreement"] >= parity["floor_top1_agreement"]
    assert parity["worst_layer_steps"] <= 2
    assert parity["worst_layer_mean_steps"] <= 0.05
    assert {"max_log_prob_difference", "kl_divergence", "checks"} <= parity.keys()
    assert results["base"]["bits_per_weight"] == 4.5  # 4, and a half scale for every 32
    assert len(results["base"]["fingerprint"]) == 64
    train = results["train"]["first"]
    assert train["steps"] == 6
    assert min(train["trainable_parameters"], train["peak_rss_bytes"]) > 0
    assert set(results["stages"]) == {*VERBS}
    # Held-out text is in the job's own files only, not in what a user passes on.
    answers = results["answers"]
    said = [*answers["float"], *answers["base"], *answers["adapted"]["first"]]
    assert len(said) == 9
    words = [json.dumps(text).encode()[1:-1] for pair in said for text in pair.values() if text]
    files = (f for part in ("base", "adapters", "export") for f in (finished / part).rglob("*"))
    assert not [f for f in files if f.is_file() and any(w in f.read_bytes() for w in words)]


def test_a_failed_proof_names_the_limit(run_of, tmp_path, monkeypatch) -> None:
    out = Path(shutil.copytree(run_of("llama"), tmp_path / "out"))
    limits = partial(Limits, layer_steps=-1.0, layer_mean_steps=-1.0)
    monkeypatch.setattr(file_stages, "Limits", limits)
    done = qwlora("verify", out)
    assert done.returncode == 1
    assert "limit: at most -1" in done.stderr
    parity = json.loads((out / "results.json").read_text())["parity"]["onnx"]
    assert not all(case["passed"] for case in parity.values())
    assert "Do not ship" in done.stdout


def test_exported_names_and_encodings_agree(finished: Path) -> None:
    folder = finished / "export" / "onnx"
    onnx.checker.check_model(str(folder / "base" / "model.onnx"), full_check=True)
    graph = onnx.load(folder / "base" / "model.onnx").graph
    tensors = {o for node in graph.node for o in node.output} | {i.name for i in graph.initializer}
    for name in ("first", "base"):
        encodings = json.loads((folder / name / "model.encodings").read_text())
        entries = encodings["activation_encodings"] + encodings["param_encodings"]
        names = [entry["name"] for entry in entries]
        assert len(names) == len(set(names))
        assert set(names) <= tensors
    source = load_recipe(finished / "recipe.yaml").model.source
    parameters = dict(AutoModelForCausalLM.from_pretrained(source).named_parameters())
    assert set(parameters) <= set(names)


def test_the_exported_adapter_is_the_one_that_the_encodings_are_of(finished: Path) -> None:
    folder, calibrated = (finished / part for part in ("export/onnx/first", "simulation/first"))
    model = load_adapter(load_base(finished / "base"), calibrated / "adapter").eval()
    parameters = {path: p.detach() for path, p in model.named_parameters()}
    factors = {canonical_name(path): p for path, p in parameters.items() if is_adapter_name(path)}
    document = json.loads((folder / "model.encodings").read_text())
    exported = {entry["name"]: entry["scale"] for entry in document["param_encodings"]}
    trained = load_file(finished / "adapters" / "first" / "adapter_model.safetensors").values()
    assert factors
    for name, factor in factors.items():
        scale = measure(factor, Scheme(8, granularity=PerChannel(0))).scale.flatten()
        np.testing.assert_allclose(exported[name], scale, rtol=1e-6)
        assert any(torch.equal(tensor, factor) for tensor in trained)
    assert load_simulation(calibrated, model).encodings


def test_a_moved_bundle_is_proven_and_changed_files_are_named(run_of: Any, tmp_path: Path) -> None:
    shutil.copytree(run_of("llama") / "export" / "onnx", tmp_path / "onnx")
    found = verify_bundle(tmp_path / "onnx")["first"]
    assert found["passed"], found["problems"]
    assert found["figures"]["exact"]["adapter"]["top1_agreement"] == 1
    for name in ("base/model.onnx.data", "first/adapter.onnx_adapter", "first/model.encodings"):
        flip_bit(tmp_path / "onnx" / name)
        with pytest.raises(FingerprintError, match=name.partition("/")[2]):
            verify_bundle(tmp_path / "onnx")
        flip_bit(tmp_path / "onnx" / name)  # back


@pytest.mark.slow
def test_interrupted_training_goes_on_to_the_same_adapter(recipe_for: Any, tmp_path: Path) -> None:
    adapters = [{"name": "first", "rank": 4, "steps": 60, "warmup_steps": 1, "checkpoint_steps": 5}]
    path = recipe_for(adapters=adapters)
    interrupted, whole = tmp_path / "interrupted", tmp_path / "whole"
    command = [sys.executable, "-m", "qwlora", "run", str(path), "--out", str(interrupted)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600  # a busy machine
    while not list((interrupted / ".qwlora" / "work").glob("*/checkpoint-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted by SIGINT, stopped after step" in errors
    assert not (interrupted / "adapters").exists()
    results = Job(path, interrupted).run("quantize", "train")
    assert results["train"]["first"]["resumed_from_step"] > 0
    assert not list((interrupted / ".qwlora" / "work").glob("*"))
    Job(path, whole).run("quantize", "train")
    a, b = (d / "adapters" / "first" / "adapter_model.safetensors" for d in (interrupted, whole))
    assert a.read_bytes() == b.read_bytes()


def test_integers_of_an_encodings_file_are_kept_and_documents_stay_apart(
    job_for: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    pairs = [{"prompt": text(i, 3), "completion": " " + text(i + 50, 3)} for i in range(30)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    model, scheme = tiny_model("llama"), Scheme(4, granularity=PerChannel(0))
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    layers = [name for name in linear if name != "lm_head"]
    weights = {f"{n}.weight": model.get_parameter(f"{n}.weight").detach() for n in layers}
    grids = {name: measure(weight, scheme) for name, weight in weights.items()}
    entries = tuple(entry_of(name, grid, "1.0.0") for name, grid in grids.items())
    file = EncodingsFile("1.0.0", entries, parameters=frozenset(grids))
    write_encodings(file, tmp_path / "model.encodings")
    encodings = str(tmp_path / "model.encodings")
    source = {"source": str(checkpoints["llama"]), "encodings": encodings}
    data = {"source": str(tmp_path / "data.jsonl"), "sequence_tokens": 64}
    job = job_for(model=source, data=data, base={"solver": "keep"})
    results = job.run("quantize", "train", changes=["adapters.0.init=qera"])
    started = results["train"]["first"]["init"]["layers"]
    assert started.keys() == {*layers}
    assert all(layer["after"] < layer["before"] for layer in started.values())
    packed = packed_weights(load_base(job.out / "base"))
    assert packed.keys() == grids.keys()
    for name, grid in grids.items():
        assert torch.equal(packed[name].codes, grid.quantize(weights[name]))
        assert torch.equal(packed[name].encoding.scale, grid.scale)
    assert results["data"]["packing"] == "documents"


def test_bits_by_budget_become_rules_to_reuse(recipe_for: Any, tmp_path: Path) -> None:
    first = {"match": "*.layers.0.mlp.up_proj", "weights": "w6-signed32"}
    section = {"solver": "rtn", "calibration_sequences": 2, "rules": [first]}

    def base(**more: Any) -> dict[str, Any]:
        job = Job(recipe_for("one-layer llama", base=section | more), tmp_path / "-".join(more))
        found: dict[str, Any] = job.run("quantize")["base"]
        return found

    chosen = base(bits=4.0)
    assert 3.8 < chosen["bits_per_weight"] <= 4
    rules = load_yaml((tmp_path / "bits" / "base" / "rules.yaml").read_text())["base"]["rules"]
    assert rules[0] == first
    assert base(rules=rules)["fingerprint"] == chosen["fingerprint"]
    assert not (tmp_path / "rules" / "base" / "rules.yaml").exists()
    assert base(size=f"{chosen['bytes'] / 1e3}kB")["fingerprint"] == chosen["fingerprint"]


def test_a_model_that_can_only_be_loaded_whole_is_and_that_is_said(
    job_for: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    pickled = shutil.copytree(checkpoints["one-layer llama"], tmp_path / "pickled")
    torch.save(tiny_model("llama", layers=1).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    job = job_for("one-layer llama")
    expected = job.run("quantize")["base"]["fingerprint"]
    assert "loaded whole" not in " ".join(job.said)
    job.out = tmp_path / "whole"
    changes = [f"model.source={pickled}"]
    assert job.run("quantize", changes=changes)["base"]["fingerprint"] == expected
    assert "loaded at once, which takes more memory" in " ".join(job.said)


def test_integers_of_a_base_are_kept(recipe_for: Any, tmp_path: Path) -> None:
    first = Job(recipe_for("one-layer llama"), tmp_path / "first").run("quantize")
    path = recipe_for(model={"source": str(tmp_path / "first" / "base")}, base={"solver": "keep"})
    second = Job(path, tmp_path / "second").run("quantize")
    assert second["base"]["fingerprint"] == first["base"]["fingerprint"]
    for change, key in (("base.solver=rtn", "base.solver: keep"), ("reference=float", "reference")):
        with pytest.raises(SourceError, match=key):
            Job(path, tmp_path / "third").run("quantize", changes=[change])


def test_quantizing_alone_goes_through_the_files_and_makes_the_same_base(
    recipe_for: Any, tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole run quantizes the float model that its perplexity was measured of; `qwlora quantize` never has it in memory, here on a disk without links."""

    def refuse(*names: str) -> None:
        raise OSError("no links here, and no whole model")

    model = shutil.copytree(checkpoints["qwen3"], tmp_path / "model")
    GenerationConfig(eos_token_id=[7, 8], temperature=0.5, do_sample=True).save_pretrained(model)
    recipe = recipe_for(
        "qwen3",
        model={"source": str(model)},
        base={"solver": "gptq", "calibration_sequences": 2},
        adapters=[{"name": "first", "steps": 1, "warmup_steps": 0, "rank": 2, "init": "qera"}],
    )
    whole = Job(recipe, tmp_path / "whole").run("quantize", "train", "evaluate")
    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr("qwlora.pipeline.stages.job_context.load_model", refuse)
    alone = Job(recipe, tmp_path / "alone").run("quantize")
    assert alone["base"] == whole["base"]
    for out in ("whole", "alone"):
        assert load_base(tmp_path / out / "base").generation_config.eos_token_id == [7, 8]
