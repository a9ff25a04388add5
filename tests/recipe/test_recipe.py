"""What the recipe refuses, and how it says so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwlora.errors import RecipeError
from qwlora.grid.scheme import PerBlock, Scheme
from qwlora.recipe import Recipe, load_recipe, parse_recipe
from qwlora.recipe.reference import full_recipe, starter_recipe


def problems(path: Path, *changes: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, changes)
    return list(caught.value.problems)


MISTAKES = {
    "data.sequence_tokns=5": "data.sequence_tokns: unknown key; did you mean sequence_tokens?",
    "bse.solver=rtn": "bse: unknown key; did you mean base?",
    "base.wieghts=w4-block32": "base.wieghts: unknown key; did you mean weights?",
    "base.weights={bitwidth: 3}": "base.weights: Input should be a valid string",
    "base.weights=w4_block32": (
        "base.weights: scheme 'w4_block32' is not understood; write it like w4-block32, "
        "w8-channel or w3-block64-asymmetric"
    ),
    "base.weights=w9-channel": (
        "base.weights: String should match pattern '^w[2-8]-' (given: 'w9-channel')"
    ),
    "base.rules=[{match: '*', weights: w4-signed32-asymmetric}]": (
        "base.rules.0.weights: signed grids have no offsets; remove -asymmetric (in Python, "
        "symmetric=False), or use block (PerBlock)"
    ),
    "base.rules=[{match: '*'}]": (
        "base.rules.0: the rule changes nothing; set keep: float, weights or solver"
    ),
    "base.rules=[{match: '*', keep: float, solver: rtn, weights: w8-channel}]": (
        "base.rules.0: keep: float excludes solver, weights; remove one or the other"
    ),
    **{
        f"simulation.adapter_weights={name}": (
            "simulation.adapter_weights: String should match pattern "
            f"'^w([4-9]|1[0-6])-(channel|tensor)(-asymmetric)?$' (given: {name!r})"
        )
        for name in ("w3-tensor", "w17-channel", "w8-block32")
    },
    "adapters.0.rnk=3": "adapters.0.rnk: unknown key; did you mean rank?",
    "simulation.rules=[{match: x, bits: 8}]": (
        "simulation.rules.0.bits: unknown key; did you mean bitwidth?"
    ),
    "adapters.0.warmup_steps=6": "adapters.0: lower warmup_steps (6) below steps (6)",
    "adapters.0.name=../x": (
        "adapters.0.name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9_-]*$' (given: '../x')"
    ),
    f"adapters=[{{name: {'a' * 300}}}]": (
        f"adapters.0.name: String should have at most 100 characters (given: {'a' * 300!r})"
    ),
    "adapters.0.alpha=.inf": "adapters.0.alpha: Input should be a finite number (given: inf)",
    "simulation.rules=[{match: x, minimum: .nan}]": (
        "simulation.rules.0.minimum: Input should be a finite number (given: nan)"
    ),
    "adapters=[]": "adapters: List should have at least 1 item after validation, not 0",
    "adapters=[{name: a}, {name: b}, {name: A}]": (
        "adapters a, A: each name becomes a folder, and some file systems ignore case; "
        "choose names that differ in more than case"
    ),
    "model={}": "model.source: required, but not set",
    "simulation.percentile=40": (
        "simulation.percentile: Input should be greater than 50 (given: 40)"
    ),
    "simulation.rules=[{match: lm_head, keep: float, bitwidth: 8}]": (
        "simulation.rules.0: rule 'lm_head': keep: float contradicts bitwidth; remove one of them"
    ),
    "simulation={activation_bitwidth: 4, rules: [{match: x, bitwidth: 6}]}": (
        "target onnx: simulation.activation_bitwidth 4, simulation.rules.0.bitwidth 6: "
        "activations have 8 or 16 bits. Change it, or use other targets"
    ),
    "simulation.adapter_activation_bitwidth=4": (
        "target onnx: simulation.adapter_activation_bitwidth 4: "
        "activations have 8 or 16 bits. Change it, or use other targets"
    ),
    "export={targets: [aimet], layout: genie}": (
        "export: layout: genie is for qairt or qnn. Add it to targets, or remove layout"
    ),
    "base={bits: 3.5, size: 60MB}": (
        "base: bits and size are two ways to say the same; remove one"
    ),
    "base={solver: keep, bits: 3.5}": (
        "base: solver keep uses the integers unchanged; remove bits"
    ),
    "seed": "--set seed: expected KEY=VALUE, for example base.weights=w3-block32",
    **{
        change: f"--set {change}: the recipe has no {change.split('=')[0]}. Members of a list have "
        "numbers from 0, adapters also names: adapters.0.rank=8, adapters.NAME.rank=8"
        for change in ("adapters.7.rank=3", "adapters.fist.rank=3")
    },
    "name.x=3": "--set name.x=3: name is a single value, not a section",
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.items())
def test_each_mistake_is_named(recipe_for: Any, change: str, message: str) -> None:
    assert problems(recipe_for(), change) == [message]


@pytest.mark.parametrize(
    "changes",
    [
        ("adapters.0.init=zero", "adapters.0.init_share=0.25"),
        ("adapters.0.unknown_base=accept",),
        ("base.tuning.learning_rate=0.01",),
        ("model.keep_float=[lm_head]",),
        ("export.use_cases=[first]", "export.graphs={tokens: [64, 2], context: [128]}"),
    ],
)
def test_keys_without_effect_are_allowed(recipe_for: Any, changes: tuple[str, ...]) -> None:
    load_recipe(recipe_for(), changes)


def test_an_adapter_is_set_by_its_name(recipe_for: Any) -> None:
    recipe = load_recipe(recipe_for(), ("adapters.first.rank=3", "adapters.0.steps=7"))
    assert (recipe.adapters[0].rank, recipe.adapters[0].steps) == (3, 7)


def test_all_mistakes_are_shown_together(recipe_for: Any) -> None:
    data = {"source": "/not/there.txt", "sequence_tokens": "x"}
    path = recipe_for(model={"source": "/not/there"}, data=data, sead=1)
    found = problems(path, "base.weights=w1-channel")
    keys = ["model.source", "data.source", "data.sequence_tokens", "base.weights", "sead"]
    assert [problem.split(":")[0] for problem in found] == keys


NOT_INSTALLED = "'not_installed_here' is not installed. Install it: pip install not-installed-here"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/not/there", "does not exist. Give a folder with config.json, a .gguf file"),
        ("package:not_installed_here/model.gguf", NOT_INSTALLED),
        ("{tmp}", "has no config.json"),
        ("{tmp}/notes.txt", "is not a .gguf file. For a Hugging Face checkpoint, give its folder"),
    ],
)
def test_missing_models_are_found(
    recipe_for: Any, tmp_path: Path, source: str, message: str
) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (found,) = problems(recipe_for(model={"source": source.format(tmp=tmp_path)}))
    assert found.startswith("model.source: ")
    assert message in found


def test_missing_encodings_are_found_early(recipe_for: Any, tmp_path: Path) -> None:
    changes = (f"model.encodings={tmp_path}", "base.solver=keep", "data.source=/not/there.txt")
    remedy = "Give the .encodings or .json file that AIMET wrote"
    of_encodings, of_data = problems(recipe_for(), *changes)
    assert of_encodings == f"model.encodings: {str(tmp_path)!r} is a folder. {remedy}"
    assert of_data.startswith("data.source: ")


def test_missing_paths_are_shown_as_absolute(
    recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    every = problems(
        recipe_for(),
        "model.source=./no/model",
        "model.encodings=no/file.encodings",
        "data.source=./no/data",
        "data.chat_template=no/template.jinja",
        "adapters.0.continue_from=./no/adapter",
        "adapters.0.data={source: no/text.jsonl}",
    )
    found = [problem for problem in every if "does not exist" in problem]
    places = ("model", "file.encodings", "data", "template.jinja", "text.jsonl", "adapter")
    for problem, place in zip(found, places, strict=True):
        assert f"does not exist (looked for {tmp_path}/no/{place})" in problem


def test_unreadable_recipes(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path / "no.yaml")
    assert problem.endswith("no.yaml' cannot be read: No such file or directory")
    (tmp_path / "list.yaml").write_text("- 1")
    assert "is not a mapping of sections" in problems(tmp_path / "list.yaml")[0]
    (tmp_path / "bad.yaml").write_text("a: [")
    assert "is not YAML" in problems(tmp_path / "bad.yaml")[0]


def test_the_resolved_recipe_reads_back_as_itself(recipe_for: Any, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_for(), ("base.weights=w04-channel",))
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    changed = load_recipe(tmp_path / "resolved.yaml", ("adapters.0.data.held_out=0.1",))
    assert changed.data_of(changed.adapters[0]).held_out == 0.1  # its data is null in the file


def test_starter_recipe_is_short_and_changes_no_default(recipe_for: Any) -> None:
    given = yaml.safe_load(recipe_for().read_text())
    assert len(starter_recipe().splitlines()) <= 25
    content = yaml.safe_load(starter_recipe())
    content["model"], content["data"]["source"] = given["model"], given["data"]["source"]
    assert Recipe.model_validate(content) == Recipe.model_validate(
        {"model": given["model"], "data": content["data"], "adapters": [{"name": "first"}]}
    )
    (advice,) = problems(recipe_for(), "seed")  # its example works on the recipe that `init` writes
    assert parse_recipe(content, "", (advice.rpartition(" ")[2],)).base.scheme.bitwidth == 3
    for_htp = parse_recipe(content, "", ("export.targets=[qairt_pipeline]",))
    assert for_htp.base.weights == "w4-block32"


def test_full_recipe_lists_every_key_with_its_default(recipe_for: Any) -> None:
    given = yaml.safe_load(recipe_for().read_text())
    assert set(yaml.safe_load(full_recipe())) == {"model", "data", "adapters"}
    body = full_recipe().split("\n", 2)[2]
    content = yaml.safe_load(re.sub(r"(?m)^( *)# ", r"\1", body))
    assert set(content) == set(Recipe.model_fields)
    given["data"] = {"source": given["data"]["source"]}
    content |= {"model": given["model"], "data": content["data"] | given["data"]}
    assert Recipe.model_validate(content) == Recipe.model_validate(
        {"model": given["model"], "data": given["data"], "adapters": [{"name": "first"}]}
    )


def test_presets_fill_in_what_the_recipe_does_not_set(recipe_for: Any) -> None:
    best = load_recipe(recipe_for(preset="best"))
    assert (best.base.solver, best.base.tuning.steps) == ("gptq", 512)
    assert [part.text for part in best.base.calibration] == ["job", "model"]
    assert [adapter.init for adapter in best.adapters] == ["qera"]
    own = load_recipe(recipe_for(preset="best"), ("base.solver=rtn", "adapters.0.init=zero"))
    assert (own.base.solver, own.base.tuning.steps, own.adapters[0].init) == ("rtn", 512, "zero")
    fast = load_recipe(recipe_for(preset="fast"))
    assert (fast.base.solver, fast.adapters[0].init) == ("search", "zero")


@pytest.mark.parametrize(("grid", "share"), [("w2-block32-asymmetric", 1), ("w3-block64", 0.5)])
def test_at_2_bits_all_ranks_carry_the_correction(grid: str, share: float, recipe_for: Any) -> None:
    recipe = load_recipe(recipe_for(preset="balanced"), (f"base.weights={grid}",))
    assert recipe.init_share(recipe.adapters[0]) == share
    assert recipe.init_share(recipe.adapters[0].model_copy(update={"init_share": 0.25})) == 0.25


def test_presets_give_no_correcting_start_where_there_is_none(recipe_for: Any) -> None:
    dora = load_recipe(recipe_for(preset="balanced"), ("adapters.0.dora=true",))
    kept = load_recipe(recipe_for(preset="balanced"), ("base.solver=keep",))
    assert (dora.adapters[0].init, kept.adapters[0].init) == ("zero", "zero")
    assert (dora.export.targets, kept.export.targets) == (["onnx_each"], ["onnx"])
    assert kept.base.tuning.steps == 0


@pytest.mark.parametrize(
    ("targets", "name"),
    [
        ("[onnx, genai, web, hf, gguf, mlx, openvino]", "w4-signed32"),
        ("[hf, qairt_pipeline]", "w4-block32"),
    ],
)
def test_signed_is_the_default(recipe_for: Any, targets: str, name: str) -> None:
    assert load_recipe(recipe_for(), (f"export.targets={targets}",)).base.weights == name


def test_a_rule_without_weights_has_those_of_the_base(recipe_for: Any) -> None:
    rules = "[{match: a, solver: rtn}, {match: b, weights: w8-tensor}, {match: c, keep: float}]"
    recipe = load_recipe(
        recipe_for(), ("base.weights=w2-block32-asymmetric", f"base.rules={rules}")
    )
    schemes = [Scheme(2, False, PerBlock(32)), Scheme(8), None]
    assert [rule.scheme for rule in recipe.base.layer_rules()] == schemes


@pytest.mark.parametrize(
    ("targets", "bitwidths"),
    [("[onnx]", {2, 3, 4, 5, 6, 7, 8}), ("[mlx, hf]", {2, 3, 4, 5, 6, 8}), ("[gguf]", {4, 5, 8})],
)
def test_a_budget_chooses_from_what_all_targets_hold(
    recipe_for: Any, targets: str, bitwidths: set[int]
) -> None:
    recipe = load_recipe(recipe_for(), ("base.size=1.5GB", f"export.targets={targets}"))
    schemes = recipe.budget_schemes()
    assert {scheme.bitwidth for scheme in schemes} == bitwidths
    assert len(schemes) == 3 * len(bitwidths), "blocks of 32, 64 and 128"
    assert recipe.base.bytes == 1.5e9


def test_a_budget_of_schemes_that_no_folder_holds_together_is_refused(recipe_for: Any) -> None:
    grids = ("base={bits: 4, weights: w4-block32-asymmetric}", "export.targets=[hf]")
    (found,) = problems(recipe_for(), *grids)
    assert re.search(r"base\.bits.* target hf: .*only if all layers have it.*symmetric", found)


HEAVY = """
import sys
from pathlib import Path
import qwlora.cli.main, qwlora.recipe.reference
from qwlora.recipe import load_recipe
load_recipe(Path(sys.argv[1]))
sys.argv = ['qwlora', '--help']
try: qwlora.cli.main.main()
except SystemExit: pass
print('heavy:', [m for m in ('torch', 'transformers', 'peft', 'onnx') if m in sys.modules])
"""


def test_validation_and_help_need_no_torch(recipe_for: Any) -> None:
    command = [sys.executable, "-c", HEAVY, str(recipe_for())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: []\n")


LONG = "x" * 5000


@pytest.mark.parametrize("value", ["[a]", "2024-01-31T00:00:00", "x" * 300, "3"])
def test_a_name_that_cannot_be_one_names_its_key(recipe_for: Any, value: str) -> None:
    changes = (f"adapters.0.name={value}", "adapters.0.continue_from=first/second")
    assert problems(recipe_for(), f"name={value}")[0].startswith("name: ")
    assert problems(recipe_for(), *changes)[0].startswith("adapters.0.name: ")


@pytest.mark.parametrize(
    ("key", "value", "fact"),
    [
        *((key, "~nouser/x", "home directory") for key in ("model.source", "data.chat_template")),
        *((key, f"/{LONG}", "too long") for key in ("model.encodings", "data.source")),
        ("adapters.0.continue_from", f"/{LONG}", "too long"),
    ],
)
def test_an_impossible_path_names_its_key(recipe_for: Any, key: str, value: str, fact: str) -> None:
    problem = next(p for p in problems(recipe_for(), f"{key}={value}") if p.startswith(key))
    assert fact in problem
    assert len(problem) < 600


def test_a_template_that_is_not_utf8_names_its_line(recipe_for: Any, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_bytes(b"{{ messages }}\n\xff")
    (problem,) = problems(recipe_for(), f"data.chat_template={tmp_path / 'chat.jinja'}")
    assert "chat.jinja:2" in problem
    assert "UTF-8" in problem


def test_every_problem_of_several_sections_is_listed_once(recipe_for: Any, tmp_path: Path) -> None:
    """A value that an adapter takes from the data section is one problem, and so is each clash."""
    adapters = [{"name": "a", "data": {"turns": "apart"}}, {"name": "b", "continue_from": "c"}]
    recipe = recipe_for(adapters=adapters, data={"source": "/not/there.txt"})
    places = [problem.split(":")[0] for problem in problems(recipe)]
    assert places == ["data.source", "adapters.1.continue_from"]
    changes = ("workflow=qwa-lora", "data.packing=documents", "adapters.0.dropout=0.1")
    assert len(problems(recipe_for(), *changes, "base.calibrate_on=[x]")) == 3


def test_paths_are_relative_to_the_folder_of_the_recipe(
    recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "elsewhere").mkdir()
    path = recipe_for()
    monkeypatch.chdir(tmp_path / "elsewhere")
    changes = ("data.source=texts", "adapters.0={name: a, continue_from: texts}")
    recipe = load_recipe(path, changes)
    assert recipe.data.source == recipe.adapters[0].continue_from == str(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path("recipe.yaml"), changes).data.source == str(tmp_path / "texts")
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "elsewhere")  # and its parent is not texts
    for longer, same in ("elsewhere/../texts", "texts"), ("texts/link/../texts",) * 2:
        assert load_recipe(path, (f"data.source={longer}",)).data.source == str(tmp_path / same)
    (tmp_path / "elsewhere" / "own").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (found,) = problems(path, "data.source=own")
    assert f"looked for {tmp_path / 'own'}). Give elsewhere/own" in found


def test_a_folder_without_a_slash_is_no_adapter_of_the_recipe(
    recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    (tmp_path / "elsewhere").mkdir()
    adapters = [{"name": "first"}, {"name": "b", "continue_from": "elsewhere"}]
    adapters.append({"name": "c", "continue_from": "first"})
    recipe = load_recipe(recipe_for(adapters=adapters))
    starts = [adapter.continue_from for adapter in recipe.adapters]
    assert starts == [None, str(tmp_path / "elsewhere"), "first"]
