"""Jobs of several adapters: what they share, and in which stages; and workflow qwa-lora, where the base's
activations are calibrated first, and adapters are trained through them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import tiny_model
from pipeline.conftest import FakeJob, stage_keys
from qwlora.errors import DirectoryError, RecipeError
from qwlora.quantize.solvers import REVISIONS
from qwlora.recipe import load_recipe
from qwlora.simulation.saved_simulation import load_activations, load_encodings
from qwlora.targets.onnx.onnx_runtime import OnnxModel

pytestmark = pytest.mark.usefixtures("shared_captures")
SHORT = {"rank": 4, "steps": 2, "warmup_steps": 0}
TWO = [{"name": n, **SHORT, "learning_rate": rate} for n, rate in (("a", 5e-3), ("b", 2e-2))]
VERBS = ("quantize", "train", "calibrate", "evaluate")
EIGHT_BITS = "simulation.activation_bitwidth=8"


@pytest.mark.slow
def test_adapters_share_what_the_recipe_says(job_for: Any) -> None:
    job, found = job_for(adapters=TWO), {}
    out = job.out
    for mode in ("adapter_only", "none"):
        changes = [EIGHT_BITS, f"simulation.base_activations={mode}"]
        results = job.run(*VERBS, changes=changes)
        evaluated = {f"evaluate/simulated/{name}" for name in "ab"}
        assert {*job.done} >= {"calibrate", "calibrate/a", "calibrate/b"} | evaluated
        a, b = (load_encodings(out / "simulation" / name) for name in "ab")
        assert a.keys() == b.keys()
        differ = {name for name in a if not torch.equal(a[name].scale, b[name].scale)}
        found[mode] = (results, differ)
    partly, differ = found["adapter_only"]
    assert {name.rpartition(".")[2] for name in differ} == {"linear", "mul", "weight"}
    assert all("lora_" in name or name.endswith("_proj.mul") for name in differ)
    results, differ = found["none"]
    assert not differ
    files = [out / "simulation" / name / "simulation.encodings" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert results["sharing"]["captures"] == 1
    for name in "ab":
        own_perplexity = results["simulation"][name]["perplexity_with_own_encodings"]
        assert own_perplexity == partly["simulation"][name]["perplexity_with_own_encodings"]
        assert results["perplexity"]["simulated"][name] == pytest.approx(own_perplexity, rel=0.05)
        assert results["perplexity"]["simulated"][name] != own_perplexity


@pytest.mark.slow
def test_a_session_of_adapters_that_share_activations_passes(job_for: Any) -> None:
    job = job_for(adapters=TWO, simulation={"base_activations": "adapter_only"})
    parity = job.run("quantize", "train", "calibrate", "export", "verify")["parity"]["onnx"]
    assert parity.keys() == {"a", "b", "base"}
    assert all(found["passed"] for found in parity.values())
    model = OnnxModel(job.out / "export" / "onnx" / "base")
    names = {value.name for value in model.session.get_overridable_initializers()}
    assert "model.layers.0.self_attn.q_proj.add.scale" in names
    assert not {"model.layers.0.self_attn.q_proj.linear.scale", "model.norm.mul.scale"} & names


def test_another_adapter_changes_what_is_shared(recipe_for: Any, tmp_path: Path) -> None:
    path = recipe_for(adapters=TWO, simulation={"base_activations": "none"})
    before, after = (stage_keys(path, f"adapters.1.steps={steps}") for steps in (2, 3))
    changed = {name for name in before if before[name] != after[name]}
    assert {"calibrate", "calibrate/a", "calibrate/b", "export/onnx/a"} <= changed
    assert "train/a" not in changed


IMPORTS = [  # layers of the job's adapter and of the import, and whether the first have the others
    ({}, {"target_modules": ["q_proj", "down_proj"], "r": 3}, True),
    ({"target_modules": ["self_attn.q_proj"]}, {"target_modules": ["q_proj"]}, True),
    ({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "v_proj"]}, False),
    ({"layers": [0]}, {"target_modules": ["q_proj"]}, False),
    ({}, {"target_modules": ["q_proj", "lm_head"]}, False),
    ({}, {"target_modules": ["q_proj", "embed_tokens"]}, False),
    ({}, {"target_modules": ["q_proj"], "use_dora": True}, False),
]


@pytest.mark.parametrize(("own", "given", "is_covered"), IMPORTS)
@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
def test_an_import_of_layers_that_the_base_has_exports_nothing_again(
    recipe_for: Any, tmp_path: Path, own: Any, given: Any, is_covered: bool
) -> None:
    model = get_peft_model(tiny_model("qwen3", layers=1), LoraConfig(**given))
    model.save_pretrained(str(tmp_path / "elsewhere"), save_embedding_layers=False)
    first = TWO[0] | own
    imported = {"name": "b", "continue_from": "elsewhere", "unknown_base": "accept", "steps": 0}
    before = stage_keys(recipe_for("qwen3", adapters=[first]))
    after = stage_keys(recipe_for("qwen3", adapters=[first, imported]))
    for stage in ("calibrate/_base", "export/onnx", "export/onnx/a"):
        assert (before[stage] == after[stage]) == is_covered


def test_a_start_depends_on_its_inputs(recipe_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(init: str) -> dict[str, str]:
        return stage_keys(recipe_for(), "base.solver=rtn", f"adapters.0.init={init}")

    before = {init: keys(init) for init in ("zero", "svd", "qera")}
    all_inits = {init: ["quantize", "train/first"] for init in before}
    for name, remade in (
        ("layer_statistics", {"qera": ["train/first"]}),
        ("initialize_adapter", {"svd": ["train/first"], "qera": ["train/first"]}),
        ("rtn", all_inits),
        ("gptq", {}),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(REVISIONS, name, 99)
            for init, old in before.items():
                new = keys(init)
                changed = [s for s in ("quantize", "train/first") if new[s] != old[s]]
                assert changed == remade.get(init, [])


LAYERS = ("q_proj", "up_proj")
MATCHES = [f"*.{layer}.lora_A.weight" for layer in LAYERS]
ONE_RULE_EACH = [{"match": match, "of": "weights", "bitwidth": 4} for match in MATCHES]
ON_DIFFERENT_LAYERS = [{**TWO[i], "target_modules": [layer]} for i, layer in enumerate(LAYERS)]


@pytest.mark.slow
@pytest.mark.parametrize("workflow", ["qw-lora", "qwa-lora"])
def test_a_rule_may_be_for_one_adapter_alone(job_for: Any, workflow: str) -> None:
    """And for none of the base's values, where that is calibrated first."""
    rules = {"rules": ONE_RULE_EACH}
    job = job_for(workflow=workflow, adapters=ON_DIFFERENT_LAYERS, simulation=rules)
    job.run("quantize", "train", "calibrate")
    assert {*job.done} >= {"train/a", "train/b", "calibrate/a", "calibrate/b"}
    for name, layer in (("a", "self_attn.q_proj"), ("b", "mlp.up_proj")):
        encodings = load_encodings(job.out / "simulation" / name)
        assert encodings[f"model.layers.0.{layer}.lora_A.weight"].scheme.bitwidth == 4


def test_epochs_are_passes_over_the_training_sequences(job_for: Any) -> None:
    job = job_for(adapters=[{"name": "a", "rank": 4, "epochs": 1.5, "batch_sequences": 2}])
    results = job.run("quantize", "train")
    count, trained = results["data"]["train"]["sequences"], results["train"]["a"]
    assert trained["steps"] == len(trained["losses"]) == math.ceil(1.5 * count / 2) != 60
    assert trained["epochs"] == pytest.approx(1.5, abs=2 / count)
    assert f"a: {trained['steps']} steps = 1.5 epochs" in job.said
    job.run("quantize", "train", changes=["adapters.0.epochs=1.5"])
    assert not job.done


FIRST = {"name": "first", "rank": 4, "steps": 4, "warmup_steps": 1, "learning_rate": 5e-3}
SECOND = {**FIRST, "name": "second", "warmup_steps": 0}  # of one structure, captured once
TRAINED = ("quantize", "train")
MEASURED = (*TRAINED, "calibrate", "evaluate")


def test_adapters_are_trained_through_the_ranges_of_the_base_and_keep_them(job_for: Any) -> None:
    bits = {"activation_bitwidth": 8}
    adapters = [FIRST, SECOND]
    job = job_for("one-layer llama", workflow="qwa-lora", adapters=adapters, simulation=bits)
    results = job.run(*MEASURED)
    assert job.done.index("quantize/activations") < job.done.index("train/first")
    assert results["base_simulation"]["encodings"] > 0
    perplexity = results["perplexity"]
    assert all(found < perplexity["base"] for found in perplexity["simulated"].values())
    base = load_activations(job.out / "base_simulation")
    for name in ("first", "second"):
        kept = load_activations(job.out / "simulation" / name)
        assert base.keys() < kept.keys()
        assert all(kept[n].equals(encoding) for n, encoding in base.items())
    before, after = stage_keys(job.recipe), stage_keys(job.recipe, "simulation.observer=sqnr")
    trained = ("quantize/activations", "train/first", "train/second")
    assert all(after[name] != before[name] for name in trained)


@pytest.mark.slow
def test_export_is_proved(job_for: Any) -> None:
    job = job_for(workflow="qwa-lora", adapters=[SECOND])
    results, out = job.run(), job.out
    parity = results["parity"]["onnx"]["second"]
    assert parity["worst_layer_steps"] <= 2
    assert parity["perplexity"] == pytest.approx(parity["reference_perplexity"], rel=0.003)
    exported = json.loads((out / "export" / "onnx" / "second" / "model.encodings").read_text())
    by_name = {e["name"]: e for e in exported["activation_encodings"]}
    for name, encoding in load_activations(out / "base_simulation").items():
        assert by_name[name]["scale"] == [float(encoding.scale)]
    assert len(job.done) == 13


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning")
def test_an_adapter_that_had_dropout_goes_on_without_it(job_for: Any, tmp_path: Path) -> None:
    """PEFT's adapters often have some, and a graph of evaluation has none."""
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.05, task_type="CAUSAL_LM")
    start = get_peft_model(tiny_model("llama"), config)
    start.save_pretrained(tmp_path / "from", save_embedding_layers=False)
    steps = {"steps": 2, "warmup_steps": 0}
    begins = {"continue_from": str(tmp_path / "from"), "unknown_base": "accept", "steps": 0}
    adapters = [{"name": "kept", **begins}, {"name": "second", "continue_from": "kept", **steps}]
    job = job_for(workflow="qwa-lora", adapters=adapters)
    job.run("quantize", "train")
    assert [line.split(":")[0] for line in job.said if "dropout" in line] == ["adapter second"]
    for name, dropout in (("kept", 0.05), ("second", 0.0)):
        written = json.loads((job.out / "adapters" / name / "adapter_config.json").read_text())
        assert written["lora_dropout"] == dropout


def test_training_asks_for_the_calibration_first(job: FakeJob) -> None:
    workflow = ["workflow=qwa-lora"]
    job.run("quantize")
    message = r"(?s)train needs quantize/activations, missing .*Run first: qwlora quantize /"
    with pytest.raises(DirectoryError, match=message):
        job.run("train", changes=workflow)
    job.run("quantize", changes=workflow)
    assert job.ran == ["quantize/activations"]


def test_what_cannot_go_together_is_one_error(recipe_for: Any) -> None:
    wrong = [
        {**FIRST, "objective": "recovery", "dropout": 0.1, "gradient_checkpointing": True},
        {**SECOND, "compute": "bfloat16"},
    ]
    path = recipe_for(workflow="qwa-lora", adapters=wrong)
    with pytest.raises(RecipeError) as error:
        load_recipe(path, ("data.packing=documents",))
    keys = ("objective", "dropout", "gradient_checkpointing", "second: compute", "data.packing")
    assert not [key for key in keys if key not in str(error.value)]
