"""Jobs that write the files of AI Hub and QAIRT."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from conftest import flip_bit
from qwlora.errors import DirectoryError, FingerprintError, RecipeError
from qwlora.formats import manifest
from qwlora.pipeline import VERBS
from qwlora.pipeline.results import read_job
from qwlora.pipeline.run import run
from qwlora.recipe import load_recipe
from qwlora.report.summary_table import summary_rows
from qwlora.targets.proof.folder import RECORD, record_digest
from qwlora.targets.proof.prove import verify_bundle
from targets.npu.test_qnn_bundle import EMULATED

CASES = ["first", "second", "first+second", "none"]
EMBEDDING = {"match": "*embed_tokens", "weights": "w8-tensor"}
HTP = {
    "base": {"weights": "w4-channel", "rules": [EMBEDDING]},
    "simulation": {
        "residual_adds": "quantize",
        "symmetric_matmul_second_input": True,
        "key_value_bitwidth": 8,
        "adapter_weights": "w8-tensor",
        "base_activations": "none",
    },
    "export": {"targets": ["qnn"], "graphs": {"tokens": [8, 1], "context": [32]}},
}
WARM = {"steps": 8, "warmup_steps": 1}
TWO: list[dict[str, Any]] = [
    {"name": "first", "rank": 2, "target_modules": ["q_proj", "down_proj"], **WARM},
    {"name": "second", "rank": 4, "target_modules": ["v_proj", "down_proj"], **WARM},
]

USUAL = {  # what other targets have by default
    "policy": "npu",
    "residual_adds": "float",
    "symmetric_matmul_second_input": False,
    "key_value_bitwidth": None,
    "adapter_weights": "w8-channel",
    "base_activations": "all",
}


@pytest.mark.parametrize(
    ("targets", "asked", "other"),
    [
        (["onnx"], {}, {}),
        (["onnx", "qairt"], {}, {"residual_adds": "quantize"}),
        (["qairt"], {"policy": "weights-only"}, {"policy": "weights-only"}),
        (["aimet", "qnn"], {"adapter_weights": "w16-tensor"}, HTP["simulation"]),
    ],
)
def test_a_target_sets_what_it_needs(targets, asked, other, recipe_for) -> None:
    """And keeps what the recipe sets."""
    base = {"weights": "w4-channel", "rules": [EMBEDDING]}
    path = recipe_for(base=base, export={"targets": targets}, simulation=asked)
    found = load_recipe(path).simulation.model_dump(include={*USUAL})
    assert found == {**USUAL, **other, **asked}


def test_everything_that_the_htp_does_not_take_is_listed_before_training(recipe_for: Any) -> None:
    simulation = {"rules": [{"match": "*.softmax", "keep": "float"}]} | USUAL
    base, export = {"weights": "w3-channel"}, {"targets": ["qnn"]}
    with pytest.raises(RecipeError) as found:
        load_recipe(recipe_for(base=base, simulation=simulation, export=export))
    for key, value in {**HTP["simulation"], "symmetric_matmul_second_input": "true"}.items():
        assert f"simulation.{key}: {value}" in str(found.value)
    assert "remove keep: float" in str(found.value)
    assert "w4-channel instead of w3-channel" in str(found.value)
    narrow = {**HTP["simulation"], "activation_bitwidth": 8}
    with pytest.raises(RecipeError, match=r"(?s)blocks.*names of the norms|norms.*blocks"):
        load_recipe(recipe_for(base={"weights": "w4-block32"}, simulation=narrow, export=export))
    narrow["rules"] = [{"match": "*norm", "of": "weights", "bitwidth": 8, "symmetric": False}]
    load_recipe(recipe_for(base=HTP["base"], simulation=narrow, export=export))


QAIRT = ("export.targets=[qairt]", "simulation={residual_adds: quantize}")
AIMET = ("export.targets=[aimet]",)
GENIE = "export.layout=genie"
FLOATS = "simulation={policy: weights-only}"
GRAPHS = "export.graphs={tokens: [8, 8, 0], context: [32, 8, 4]}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ((*QAIRT, "export.use_cases=[first+third]"), "no adapter third"),
        ((*QAIRT, "export.use_cases=[none]"), "must list at least one adapter"),
        ((*QAIRT, GENIE, "export.use_cases=[first+second]"), "strength of one adapter only"),
        ((*QAIRT, "adapters.0.name=none"), "choose another name"),
        ((*QAIRT, "adapters.0.name=host"), "adapter host has the name of another"),
        ((*QAIRT, "workflow=qwa-lora"), "Use workflow qw-lora"),
        ((*QAIRT, "adapters.1.data={sequence_tokens: 16}"), "sequence_tokens: first 32, second 16"),
        ((GRAPHS,), r"(?s)\[8, 8, 0\]: .*each once.*\[0\]: .*at least 1.*\[8, 4\]: .*greater"),
        (("export.graphs={context: [128]}",), r"\[128, 1\], since"),
        (("adapters.0.name=zero",), "adapter zero has the name of another file"),
        ((*AIMET, "simulation={rules: [{match: '*.softmax', keep: float}]}"), "remove keep: float"),
        ((*AIMET, FLOATS, "simulation.key_value_bitwidth=8"), "simulation.key_value_bitwidth"),
        (
            (*AIMET, FLOATS, "simulation.rules=[{match: '*.softmax', bitwidth: 8}]"),
            "set simulation.rules.0.of: weights, or simulation.policy: npu",
        ),
        ((FLOATS,), "target qnn: .*set simulation.policy: npu"),
    ],
)
def test_impossible_graphs_and_cases(changes: tuple[str, ...], said: str, recipe_for: Any) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe_for(**{"adapters": TWO, **HTP}), changes)


def break_decode(folder: Path, proofs: list[Path]) -> None:
    """Damage the last norm of the decode graph, and write its new digests into all records."""
    for path in (*folder.glob("token_*.onnx"), *folder.glob("token_*.aimet/model.onnx")):
        model = onnx.load(path, load_external_data=False)
        norms = [node for node in model.graph.node if node.op_type == "RMSNormalization"]
        for attribute in norms[-1].attribute if norms else ():  # the host's graph has none
            if attribute.name == "epsilon":
                attribute.f = 1e6
        onnx.save(model, path)
    for record in (folder / RECORD, *proofs):
        known = json.loads(record.read_text())
        files = [name for name in known.pop("files") if name != record.name]
        if record in proofs:
            known["of"] = {"files": record_digest(folder)}
        manifest.write(record.parent, record.name, known, files)


@pytest.mark.slow
@EMULATED
def test_a_job_writes_graphs_for_the_htp(is_emulated, recipe_for, tmp_path) -> None:
    verify = {"sequences": 1, "perplexity_difference": 0.02}
    export = HTP["export"] | {"targets": ["qnn", "aimet", "qairt"]}
    export |= {"use_cases": CASES, "encodings_version": "2.0.0", "proof": "held_out"}
    recipe = load_recipe(recipe_for(**{"adapters": TWO, **HTP, "export": export, "verify": verify}))
    job = tmp_path / "job"
    parity = run(recipe, job, VERBS)["parity"]
    found = parity["qnn"]
    assert found.keys() == {*CASES}
    outcomes = [outcome for outcome, _ in summary_rows(read_job(job))]
    assert "Failed" not in outcomes
    assert ("Not measured" in outcomes) is not is_emulated
    for case in found.values():
        assert case["cpu"]["rms_log_prob_difference"] < 0.005
        if is_emulated:
            assert case["passed"]
            assert case["htp"]["rms_log_prob_difference"] < 0.02
            assert case["placement"].keys() == {"prompt_ar8_cl32", "token_ar1_cl32"}
            assert all(p["partitions"] == 1 for p in case["placement"].values())
        else:
            assert "qwlora[qnn]" in case["not_run"]
    assert len({case["reference_perplexity"] for case in found.values()}) == 4
    for target, cases in {"aimet": {"first", "second"}, "qairt": {*CASES}}.items():
        assert parity[target].keys() == cases
        bundle = shutil.copytree(job / "export" / target, tmp_path / target)
        for name, proof in verify_bundle(bundle).items():
            assert proof["passed"]
            measured = proof["figures"]["exact"]["adapter"]
            assert measured == parity[target][name]["proof"]["exact"]["adapter"]
            assert measured["top1_agreement"] > 0.9
        broken = shutil.copytree(bundle, tmp_path / f"{target}-broken")
        if target == "aimet":
            break_decode(broken / "first", [broken / "proof/first/proof.json"])
        else:
            break_decode(broken, list(broken.glob("proof/*/proof.json")))
        assert not verify_bundle(broken)["first"]["passed"]
        flip_bit(edited := next(bundle.rglob("*_host.onnx")))
        with pytest.raises(FingerprintError, match=edited.name):
            verify_bundle(bundle)
    changed = load_recipe(job / "recipe.yaml", ("export.graphs.context=[40]",))
    again = run(changed, job, ["export", "verify"])  # replaces the folder with the proofs in it
    assert all(case["passed"] for case in again["parity"]["qairt"].values())
    for name in (
        "qairt/golden/none/token_ar1_cl40/logits.npy",
        "aimet/second/submit_aihub.py",
        "qnn/second/adapter.safetensors",
    ):
        flip_bit(job / "export" / name)
        with pytest.raises(DirectoryError, match=rf"{name} has changed"):
            run(changed, job, ["verify"])
        flip_bit(job / "export" / name)  # back
