"""`qwlora simulate`: what it says of a job, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import answered, refused
from conftest import flip_bit, reseal
from qwlora.cli.show_commands import _suggestion_lines
from qwlora.cli.terminal import group_similar, table
from qwlora.errors import DirectoryError
from qwlora.pipeline.commands.open_job import open_job
from qwlora.pipeline.commands.simulate_job import explain_placement
from qwlora.pipeline.run import run
from qwlora.pipeline.store import Store
from qwlora.recipe import load_recipe
from qwlora.recipe.grid_sections import SimulationRule
from qwlora.system.seen import Seen

pytestmark = pytest.mark.usefixtures("shared_captures")
RULES = 'simulation.rules=[{match: "*.softmax", bitwidth: 8, observer: percentile, minimum: 0}, {match: lm_head, keep: float}]'


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path], corpus: Path
) -> Path:
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


def test_alike_values_are_one_line(job: Path) -> None:
    out = answered("simulate", job, "--explain", "--set", RULES)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith("adapter first, policy npu: ")
    for line in (
        "model.layers.*.self_attn.softmax 2 LlamaAttention quantize int8 asymmetric per tensor, percentile computes new values; rule '*.softmax'",
        "model.layers.*.input_layernorm.mul 2 LlamaRMSNorm float inside LlamaRMSNorm, which is one operation",
        "model.layers.*.input_layernorm.mul 2 LlamaRMSNorm quantize int16 asymmetric per tensor, sqnr output of LlamaRMSNorm",
        "model.layers.*.self_attn.q_proj.weight 2 PackedLinear quantize int4 symmetric per signed block 32 a packed weight of the base",
        "model.layers.*.self_attn.q_proj.lora_A.weight 2 quantize int8 symmetric per channel a weight of the adapter",
        "lm_head.linear 1 Linear float rule 'lm_head'",
    ):
        assert line in lines
    counts = [int(part.split()[0]) for part in lines[0].partition("npu: ")[2].split(", ")]
    by_reason = answered("simulate", job, "--set", RULES).splitlines()
    assert len(by_reason) < 25
    rows = [line.split() for line in by_reason[2:]]
    assert sum(int(row[1]) for row in rows) == sum(counts)


def test_json_has_every_value_and_what_was_calibrated(job: Path) -> None:
    found = json.loads(answered("simulate", job, "--json"))
    assert (found["adapter"], found["policy"]) == ("first", "npu")
    values = {value["name"]: value for value in found["values"]}
    assert len(values) == len(found["values"])
    softmax = values["model.layers.1.self_attn.softmax"]
    assert (softmax["kind"], softmax["observer"]) == ("activation", "sqnr")
    assert 0 <= softmax["high"] <= 1.01
    assert values["model.layers.1.self_attn.q_proj.weight"]["kind"] == "base"
    changed = explain_placement(*open_job(job, changes=("simulation.policy=weights-only",)))
    assert {v.decision.value for v in changed.values if v.kind == "activation"} == {"float"}


def test_costs_are_switched_on_one_by_one(job: Path) -> None:
    account = json.loads(answered("simulate", job, "--costs", "--json"))
    steps = ["base", "adapted", "adapter_weights", "parameters", "activations"]
    assert list(account["perplexity"]) == steps
    assert len(account["sensitivity"]) == len(account["layer_sqnr_db"]) == 10
    assert "unshared" not in account
    shared = ("--set", "simulation.base_activations=adapter_only")
    found = json.loads(answered("simulate", job, "--costs", *shared, "--json"))
    assert found["unshared"] == "adapter_only"
    lines = [" ".join(line.split()) for line in answered("simulate", job, "--costs").splitlines()]
    assert f"adapter weights {account['perplexity']['adapter_weights']:.4f}" in lines


@pytest.mark.slow
def test_a_suggestion_is_what_its_rules_give(job: Path) -> None:
    def suggested(share: float, *options: str) -> dict[str, Any]:
        return json.loads(answered("simulate", job, "--suggest", share, "--json", *options))

    loose = suggested(1)
    assert (loose["wide"], loose["rules"], loose["measured"]) == ([], [], loose["all_narrow"])
    reference = loose["limit"] / 2
    assert reference == pytest.approx(loose["float_activations"])
    assert (loose["sequences"], loose["kept"]) == (2, 0)
    share = (loose["all_narrow"] + loose["all_wide"]) / 2 / reference - 1
    assert 0 < share < 0.1, "of 8 bits on this model"
    found = suggested(share)
    assert 0 < len(found["wide"]) < found["narrow"]
    assert found["measured"] <= found["limit"]
    rules = f"simulation.rules={json.dumps(found['rules'])}"
    changes = ("--set", "simulation.activation_bitwidth=8", "--set", rules)
    account = json.loads(answered("simulate", job, "--costs", "--json", *changes))
    assert account["perplexity"]["activations"] == found["measured"]
    assert found["fresh"] is None, "the job evaluates on two sequences, and both were searched"
    fresh = suggested(1, "--set", "data.evaluation_sequences=6")["fresh"]
    assert fresh["measured"] > fresh["float_activations"] > 1
    assert fresh["sequences"] == 2


def test_a_suggestion_counts_and_prints_the_rules_that_are_there(job: Path) -> None:
    """As a resolved recipe holds them, with every key."""
    own = [{"match": "*.softmax", "bitwidth": 16}, {"match": "lm_head", "keep": "float"}]
    section = json.dumps([SimulationRule(**rule).model_dump(mode="json") for rule in own])
    rules = ("--set", f"simulation.rules={section}")
    found = json.loads(answered("simulate", job, "--suggest", "1", "--json", *rules))
    assert (found["rules"], found["wide"], found["kept"]) == (own, [], 2)
    lines = list(_suggestion_lines(found))
    assert lines[0].endswith(
        f"0 of {found['narrow']} activations at 16 bits, the others at 8; 2 more keep the grid "
        "that a rule of the recipe gives them"
    )
    assert lines[-2:] == [f"    - {json.dumps(rule)}" for rule in own]


@pytest.mark.parametrize("share", ["5", "-0.1"])
def test_a_share_is_between_zero_and_one(tmp_path: Path, share: str) -> None:
    message = refused("simulate", tmp_path, f"--suggest={share}")
    assert "'--suggest'" in message


def test_a_suggestion_says_which_text_each_figure_is_of() -> None:
    found: dict[str, Any] = {"adapter": "first", "wide": ["a"], "narrow": 3, "kept": 0}
    found |= {"rules": [], "sequences": 4, "float_activations": 2.0, "fresh": None}
    found |= {"measured": 2.1, "limit": 2.2, "all_wide": 2.05, "all_narrow": 3.0}
    text = "\n".join(_suggestion_lines({**found, "unshared": "none"}))
    assert "\nthe search used all evaluation sequences" in text
    assert "base_activations: none" in text
    fresh = {"sequences": 12, "measured": 2.3, "float_activations": 1.9}
    lines = list(_suggestion_lines({**found, "fresh": fresh}))
    assert lines[0] == "adapter first: 1 of 4 activations at 16 bits, the others at 8"
    assert [line.split("  ")[0] for line in (lines[1], lines[7])] == [
        "perplexity on the 4 held-out sequences of the search",
        "perplexity on 12 other sequences",
    ]
    values = [float(line.split()[-1]) for line in (*lines[2:7], *lines[8:10])]
    assert values == [2.1, 2.2, 2.0, 2.05, 3.0, 2.3, 1.9]
    assert lines[-1] == "  rules: []"


def test_what_cannot_be_shown(job: Path, tmp_path: Path) -> None:
    rule = ("--set", "simulation.rules=[{match: lm_hed, bitwidth: 8}]")
    for folder, options, message in (
        (tmp_path, (), "is not a job directory: it has no recipe.yaml"),
        (
            job,
            ("--adapter", "second"),
            f"has no adapters/second yet. Run first: qwlora train {job}",
        ),
        (job, rule, "'lm_hed' matches no value; did you mean lm_head"),
    ):
        assert message in refused("simulate", folder, *options)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [("activation_bitwidth", 8), ("residual_adds", "quantize")])
def test_another_recipes_calibration(job: Path, tmp_path: Path, changes: tuple[str, Any]) -> None:
    out = tmp_path / "out"
    shutil.copytree(job, out)
    content = json.loads((out / "recipe.yaml").read_text())
    content["simulation"][changes[0]] = changes[1]
    (out / "recipe.yaml").write_text(json.dumps(content))
    for asked in ("--explain", "--costs"):
        errors = refused("simulate", out, asked)
        assert f"calibrate/first: simulation.{changes[0]}: " in errors
        assert f"Run first: qwlora calibrate {out}" in errors
    # of a change nothing is calibrated, and a placement needs no calibration
    answered("simulate", out, "--set", "simulation.policy=weights-only")
    shutil.rmtree(out / "simulation" / "first")
    answered("simulate", out, "--explain")


def test_what_is_of_another_recipe_is_not_shown(job: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(job, tmp_path / "out"))
    weights, record = "adapter_model.safetensors", "qwlora.json"
    flip_bit(out / "adapters" / "first" / weights)  # as another machine trains it
    reseal(out / "adapters" / "first", record)
    store, seen = Store(out), Seen()
    changed = {name: seen.content(out / "adapters" / "first" / name) for name in (weights, record)}
    store.change("adapters/first", files=store.records["adapters/first"].files | changed)
    reason = r"train/first is another one than it was made from\nRun first: qwlora calibrate"
    with pytest.raises(DirectoryError, match=reason):
        explain_placement(*open_job(out))
    for folder in ("adapters", "simulation"):
        (out / folder / "first").rename(out / folder / "before")
    with pytest.raises(DirectoryError, match="has no adapter 'before'; there are first"):
        explain_placement(*open_job(out, "before"))


@pytest.mark.parametrize(
    "change", ["base.weights=w3-signed32", "adapters.1.rank=2", "verify.sequences=1"]
)
def test_a_change_of_something_else_is_refused(job: Path, change: str) -> None:
    changes = ("--set", "simulation.activation_bitwidth=8", "--set", change)
    errors = refused("simulate", job, *changes)
    assert f"--set {change}: this command can only change simulation.* and data.eval" in errors
    assert f"qwlora run {job} --set {change}" in errors


def test_an_adapter_whose_record_was_replaced_is_refused(job: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(job, other)
    record = other / "adapters" / "first" / "qwlora.json"
    record.write_text(json.dumps({"format": 1, "base_fingerprint": "0" * 64}))
    errors = refused("simulate", other)
    assert "adapters/first/qwlora.json has changed" in errors
    assert "qwlora train" in errors


def test_tables_of_alike_things() -> None:
    names = [("a.0.x", 1), ("a.1.x", 1), ("a.2.x", 2), ("a.5.x", 1), ("b", 1), ("a.0.y", 3)]
    groups = group_similar(names, lambda n: n[0], lambda n: n[1])
    sizes = {name: len(group) for name, group in groups}
    assert sizes == {"a.*.x (0-1,5)": 3, "a.2.x": 1, "b": 1, "a.0.y": 1}
    twice = [("a.0.x", 1), ("a.0.x", 2), ("a.1.x", 1), ("a.1.x", 2)]
    same = group_similar(twice, lambda n: n[0], lambda n: n[1])
    assert [name for name, _ in same] == ["a.*.x", "a.*.x"]
    assert list(table([("one", "2"), ("three", "4")])) == ["one    2", "three  4"]
