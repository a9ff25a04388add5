"""`qwlora simulate`: what it says of a job, and what it refuses."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import answered, refused
from conftest import flip_bit, reseal
from qwlora.errors import DirectoryError
from qwlora.pipeline.commands.open_job import open_job
from qwlora.pipeline.commands.simulate_job import explain_placement
from qwlora.pipeline.run import run
from qwlora.pipeline.store import Store
from qwlora.recipe import load_recipe
from qwlora.system.seen import Seen

pytestmark = pytest.mark.usefixtures("shared_captures")
RULES = 'simulation.rules=[{match: "*.softmax", bitwidth: 8, observer: percentile, minimum: 0}, {match: lm_head, keep: float}]'


@pytest.fixture(scope="module")
def job(tmp_path_factory, checkpoints, corpus) -> Path:
    """A job with an adapter that is calibrated, and one that is not trained."""
    folder = tmp_path_factory.mktemp("job")
    sizes = {"sequence_tokens": 32, "evaluation_sequences": 2, "calibration_sequences": 3}
    adapters = [{"name": n, "rank": 4, "steps": 1, "warmup_steps": 0} for n in ("first", "second")]
    content = {
        "model": {"source": str(checkpoints["llama"])},
        "data": {"source": str(corpus), **sizes},
        "adapters": adapters[:1],
        "simulation": {"calibration_tokens": 33, "observer": "sqnr"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    recipe = load_recipe(folder / "recipe.yaml")
    results = run(recipe, folder / "out", ("quantize", "train", "calibrate"))
    measured = results["simulation"]["first"]
    assert (measured["calibration_tokens"], measured["unseen"]) == (64, [])
    (folder / "out" / "recipe.yaml").write_text(json.dumps({**content, "adapters": adapters}))
    return folder / "out"


EXPLAINED = """
model.layers.*.self_attn.softmax 2 .*int8 asymmetric per tensor, percentile .*; rule '\\*.softmax'
model.layers.*.input_layernorm.mul 2 LlamaRMSNorm float inside LlamaRMSNorm
model.layers.*.input_layernorm.mul 2 LlamaRMSNorm quantize int16 asymmetric per tensor, sqnr
model.layers.*.self_attn.q_proj.weight 2 PackedLinear quantize int4 symmetric per signed block 32
model.layers.*.self_attn.q_proj.lora_A.weight 2 quantize int8 symmetric per channel
lm_head.linear 1 Linear float rule 'lm_head'
"""


def test_alike_values_are_one_line(job: Path) -> None:
    out = answered("simulate", job, "--explain", "--set", RULES)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in EXPLAINED.strip().splitlines():
        assert any(re.match(line, found) for found in lines), line


def test_json_has_every_value_and_what_it_costs(job: Path) -> None:
    found = json.loads(answered("simulate", job, "--json"))
    assert (found["adapter"], found["policy"]) == ("first", "npu")
    values = {value["name"]: value for value in found["values"]}
    assert len(values) == len(found["values"])
    softmax = values["model.layers.1.self_attn.softmax"]
    assert (softmax["kind"], softmax["observer"]) == ("activation", "sqnr")
    assert 0 <= softmax["high"] <= 1.01
    shared = ("--set", "simulation.base_activations=adapter_only")
    for options, unshared in (((), None), (shared, "adapter_only")):
        account = json.loads(answered("simulate", job, "--costs", "--json", *options))
        steps = ["base", "adapted", "adapter_weights", "parameters", "activations"]
        assert list(account["perplexity"]) == steps
        assert len(account["sensitivity"]) == len(account["layer_sqnr_db"]) == 10
        assert account.get("unshared") == unshared


@pytest.mark.slow
def test_a_suggestion_is_what_its_rules_give(job: Path) -> None:
    def suggested(share: float, *options: str) -> dict[str, Any]:
        return json.loads(answered("simulate", job, "--suggest", share, "--json", *options))

    loose = suggested(1)
    assert (loose["wide"], loose["rules"], loose["measured"]) == ([], [], loose["all_narrow"])
    reference = loose["limit"] / 2
    assert reference == pytest.approx(loose["float_activations"])
    assert (loose["sequences"], loose["kept"]) == (2, 0)
    share = (loose["all_narrow"] / reference - 1) / 2
    assert 0 < share < 0.1, "of 8 bits on this model"
    found = suggested(share)
    assert 0 < len(found["wide"]) < found["narrow"]
    assert found["measured"] <= found["limit"]
    rules = f"simulation.rules={json.dumps(found['rules'])}"
    changes = ("--set", "simulation.activation_bitwidth=8", "--set", rules)
    account = json.loads(answered("simulate", job, "--costs", "--json", *changes))
    assert account["perplexity"]["activations"] == found["measured"]
    assert found["fresh"] is None, "the job evaluates on two sequences, and both were searched"
    own = [{"match": "*.softmax", "bitwidth": 16}, {"match": "lm_head", "keep": "float"}]
    found = suggested(1, "--set", f"simulation.rules={json.dumps(own)}")
    assert (found["rules"], found["wide"], found["kept"]) == (own, [], 2)
    fresh = suggested(1, "--set", "data.evaluation_sequences=6")["fresh"]
    assert fresh["measured"] > fresh["float_activations"] > 1
    assert fresh["sequences"] == 2


def test_what_is_of_another_recipe_is_not_shown(job: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(job, tmp_path / "out"))
    recipe = out / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace('"sqnr"', '"min-max"'))
    with pytest.raises(DirectoryError, match=r"simulation.observer: (?s:.*)qwlora calibrate"):
        explain_placement(*open_job(out))
    answered("simulate", out, "--set", "simulation.policy=weights-only")  # nothing is calibrated
    shutil.copy(job / "recipe.yaml", recipe)
    weights, record = "adapter_model.safetensors", "qwlora.json"
    flip_bit(out / "adapters" / "first" / weights)  # as another machine trains it
    reseal(out / "adapters" / "first", record)
    store, seen = Store(out), Seen()
    changed = {name: seen.content(out / "adapters" / "first" / name) for name in (weights, record)}
    store.change("adapters/first", files=store.records["adapters/first"].files | changed)
    reason = r"train/first has changed\nRun first: qwlora calibrate"
    with pytest.raises(DirectoryError, match=reason):
        explain_placement(*open_job(out))
    shutil.rmtree(out / "simulation" / "first")
    answered("simulate", out, "--explain")


NAMES = {  # what is asked for, and what the message names
    "base.weights=w3-signed32": "--set base.weights=w3-signed32: this command can only change",
    "verify.sequences=1": "this command can only change simulation",
    "simulation.rules=[{match: lm_hed, bitwidth: 8}]": "'lm_hed' matches no value; .*lm_head",
    "--adapter second": "has no adapters/second yet. Run first: qwlora train ",
    "--suggest 5": "--suggest.* at most 1",
}


@pytest.mark.parametrize("asked", NAMES)
def test_what_cannot_be_shown_is_refused(job: Path, asked: str) -> None:
    options = asked.split() if asked.startswith("--") else ["--set", asked]
    assert re.search(NAMES[asked], refused("simulate", job, *options))
