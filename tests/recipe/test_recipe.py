"""What the recipe refuses, and how it says so; recipes follow YAML 1.2, and a key is given once."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwlora.errors import RecipeError
from qwlora.grid.scheme import PerBlock, Scheme
from qwlora.recipe import Recipe, load_recipe, parse_recipe
from qwlora.recipe.recipe_file import _keys
from qwlora.recipe.reference import full_recipe, starter_recipe
from qwlora.recipe.yaml_core import dump_yaml, load_yaml
from qwlora.targets.registry import TARGETS


def problems(path: Path, *changes: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, changes)
    return list(caught.value.problems)


MISTAKES = {  # a change, and the problem that it makes: its key, and what is said
    "data.sequence_tokns=5": "data.sequence_tokns: unknown key; did you mean data.sequence_tokens?",
    "base.weights={bitwidth: 3}": "base.weights: expected text, found {'bitwidth': 3}",
    "base.weights=w4_block32": "base.weights: scheme 'w4_block32' is not understood",
    "base.weights=w9-channel": "base.weights: 'w9-channel' does not fit this description: grid of every Linear weight",
    "base.rules=[{match: '*', weights: w4-signed32-asymmetric}]": "base.rules.0.weights: signed",
    "base.rules=[{match: '*'}]": "base.rules.0: the rule changes nothing",
    "base.rules=[{match: '*', keep: float, solver: rtn, weights: w8-channel}]": (
        "base.rules.0: keep: float cannot be combined with solver, weights"
    ),
    "simulation.adapter_weights=w3-tensor": "simulation.adapter_weights: '",
    "simulation.adapter_weights=w8-block32": "simulation.adapter_weights: '",
    "simulation.rules=[{match: x, bits: 8}]": "simulation.rules.0.bits: unknown key; did you mean simulation.rules.0.bitwidth?",
    "seed=true": "seed: expected a whole number, found True",
    "seed=1:30": "seed: expected a whole number, found '1:30'",
    "adapters.0.dora=yes": "adapters.0.dora: expected true or false, found 'yes'",
    "adapters=[{name: a, rank: 1, rank: 2}]": (
        "--set adapters=[{name: a, rank: 1, rank: 2}]: the value is not YAML: key 'rank'"
    ),
    "adapters.0.warmup_steps=6": "adapters.0: lower warmup_steps (6) below steps (6)",
    "adapters.0.epochs=2": "adapters.0: give either steps (6) or epochs (2), not both",
    "adapters.0.name=../x": "adapters.0.name: '../x' does not fit this description: name of the adapter",
    "adapters.0.alpha=.inf": "adapters.0.alpha: expected a finite number, found inf",
    "adapters=[]": "adapters: expected at least 1 in it, found []",
    "adapters=[{name: a}, {name: b}, {name: A}]": "adapters a, A: ",
    "model={}": "model.source: required, but not set",
    "simulation.percentile=40": "simulation.percentile: expected more than 50",
    "simulation.rules=[{match: lm_head, keep: float, bitwidth: 8}]": (
        "simulation.rules.0: rule 'lm_head': keep: float contradicts bitwidth"
    ),
    "simulation={activation_bitwidth: 4, rules: [{match: x, bitwidth: 6}]}": (
        "target onnx: simulation.activation_bitwidth 4, simulation.rules.0.bitwidth 6"
    ),
    "preset=ballanced": "preset: expected 'fast', 'balanced' or 'best', found 'ballanced'; did you mean balanced?",
    "export={targets: [aimet], layout: genie}": "export: layout: genie is for qairt or qnn",
    "base={bits: 3.5, size: 60MB}": "base: bits and size are two ways to say the same",
    "base={solver: keep, bits: 3.5}": "base: solver keep does not change the integers; remove bits",
    "base.calibration=[job, nowhere.txt]": "base.calibration.1.text: ",
    "seed": "--set seed: expected KEY=VALUE, for example base.weights=w3-block32",
    "adapters.7.rank=3": "--set adapters.7.rank=3: the recipe has no adapters.7.rank",
    "name.x=3": "--set name.x=3: name is a single value",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_each_mistake_is_named(recipe_for: Any, change: str) -> None:
    (problem,) = problems(recipe_for(), change)
    assert problem.startswith(MISTAKES[change])


def test_all_mistakes_are_shown_together_and_once(recipe_for: Any) -> None:
    data = {"source": "/not/there.txt", "sequence_tokens": "x", "turns": "apart"}
    adapters = [{"name": "a", "data": {"turns": "apart"}}, {"name": "b", "continue_from": "c"}]
    path = recipe_for(model={"source": "/not/there"}, data=data, adapters=adapters, sead=1)
    keys = ["model.source", "data.source", "data.sequence_tokens", "base.weights"]
    found = [problem.split(":")[0] for problem in problems(path, "base.weights=w1-channel")]
    assert found == [*keys, "adapters.1.continue_from", "sead"]
    changes = ("workflow=qwa-lora", "data.packing=documents", "adapters.0.dropout=0.1")
    assert len(problems(recipe_for(), *changes, "base.calibrate_on=[x]")) == 3


PATHS = ("model.source", "model.encodings", "data.source", "data.chat_template")
PATHS += ("adapters.0.continue_from", "adapters.0.data.source")


@pytest.mark.parametrize("key", PATHS)
def test_a_path_that_is_not_there_is_shown_as_absolute(
    recipe_for, tmp_path, monkeypatch, key
) -> None:
    monkeypatch.chdir(tmp_path)
    (problem,) = (p for p in problems(recipe_for(), f"{key}=./no/x.gguf") if "no/x" in p)
    assert problem.startswith(f"{key}: ")
    assert f"does not exist (looked for {tmp_path}/no/x.gguf)" in problem
    for value, fact in (("~nouser/x", "home directory"), (f"/{'x' * 5000}", "too long")):
        found = problems(recipe_for(), f"{key}={value}")
        assert any(p.startswith(key) and fact in p and len(p) < 600 for p in found)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.source", "package:not_installed_here/model.gguf", "pip install not-installed-here"),
        ("model.source", "{tmp}", "has no config.json"),
        ("model.source", "{tmp}/notes.txt", "is not a .gguf file"),
        ("model.encodings", "{tmp}", "is a folder. Give the .encodings or .json file"),
        ("data.chat_template", "{tmp}/notes.txt", "notes.txt:2.*UTF-8"),
        ("adapters.0.name", "x" * 300, ""),
        ("name", "[a]", ""),
        ("name", "2024-01-31T00:00:00", ""),
    ],
)
def test_a_value_that_cannot_be_used_names_its_key(
    recipe_for, tmp_path, key, value, message
) -> None:
    (tmp_path / "notes.txt").write_bytes(b"{{ messages }}\n\xff")
    found = problems(recipe_for(), f"{key}={value.format(tmp=tmp_path)}")
    assert any(re.match(f"{key}: .*{message}", problem) for problem in found)


# Wrong recipes in the words of other tools, each as a change, and the key or value meant.
WORDS = {
    "lr=1e-4": "adapters.0.learning_rate",
    "train={lr: 1e-4}": "adapters.0.learning_rate",
    "lora.r=8": "adapters.0.rank",
    "adapters.0.lora-dropout=0.1": "adapters.0.dropout",
    "lora_target_modules=[q_proj]": "adapters.0.target_modules",
    "adapters.0.num_train_epochs=3": "adapters.0.epochs",
    "data.max_seq_length=512": "data.sequence_tokens",
    "adapters.0.max_seq_length=512": "data.sequence_tokens",
    "adapters.0.bf16=true": "adapters.0.compute: bfloat16",
    "output_dir=out": "--out DIR",
    "model.model_name_or_path=x": "model.source",
    "base.load_in_4bit=true": "base.weights",
    "base.solver=nf4": "base.weights: w4-signed32",
    "base=int4": "base.weights: w4-signed32",
    "export.targets=[onnx, vLLM]": "export.targets: [hf]",
    "export=llamacpp": "export.targets: [gguf]",
    "data=some.jsonl": "data.source: some.jsonl",
    "export.targets=onnx": "export.targets: [onnx]",
    "device=gpu": "device: cuda",
    "lora_target_linear=true": "adapters.0.target_modules: all-linear",
    "load_in_8bit=true": "base.weights: w8-channel",
}


@pytest.mark.parametrize("change", WORDS)
def test_words_of_other_tools_are_known(recipe_for: Any, change: str) -> None:
    problem = problems(recipe_for(), change)[-1]
    assert re.search(rf"(did you mean |: ){re.escape(WORDS[change])}( or .*)?(\?|$)", problem)


def test_every_word_means_a_key_that_exists(recipe_for: Any) -> None:
    table = yaml.safe_load((files("qwlora.recipe") / "words.yaml").read_text())
    words = [word for line in table.values() for word in line.split()]
    assert len(words) == len(set(words))
    known = {key.rpartition(".")[2] for key in _keys()}
    assert known & {*words} == {"bits"}  # in other sections than base
    for entry in table:
        key, _, value = entry.partition(": ")
        if not entry.endswith("."):
            assert key in {"adapters[]", *_keys()}
        if value and key == "export.targets":
            assert {*yaml.safe_load(value)} <= TARGETS.keys()
        elif value and not entry.endswith("."):
            load_recipe(recipe_for(), (f"{key.replace('[]', '.0')}={value}",))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (5, 4), (6, 5), (60, 5)])
def test_a_default_fits_and_does_not_count_as_set(recipe_for, corpus, steps, warmup) -> None:
    adapters = [{"name": "a", "steps": steps, "data": {"source": str(corpus)}}]
    data = {"sequence_tokens": 32}
    path = recipe_for(preset="best", adapters=adapters, data=data)
    content = yaml.safe_load(path.read_text()) | {"base": {"solver": "rtn"}}
    recipe = parse_recipe(content, "")
    assert recipe.adapters[0].warmup_steps == warmup
    assert recipe.data_of("a").sequence_tokens == 32
    assert recipe.base.tuning.steps == 512
    assert recipe.model_dump(mode="json", exclude_unset=True) == content


def test_the_resolved_recipe_reads_back_as_itself(recipe_for: Any, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_for(), ("base.weights=w04-channel",))
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    changed = load_recipe(tmp_path / "resolved.yaml", ("adapters.0.data.held_out=0.1",))
    assert changed.data_of(changed.adapters[0]).held_out == 0.1  # its data is null in the file


def test_starter_recipe_is_short_and_changes_no_default(recipe_for: Any) -> None:
    given = yaml.safe_load(recipe_for().read_text())
    content = yaml.safe_load(starter_recipe())
    content["model"], content["data"]["source"] = given["model"], given["data"]["source"]
    assert Recipe.model_validate(content) == Recipe.model_validate(
        {"model": given["model"], "data": content["data"], "adapters": [{"name": "first"}]}
    )
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


@pytest.mark.parametrize(
    ("preset", "changes", "expected"),
    [
        ("best", (), ("gptq", 512, "qera")),
        ("best", ("base.solver=rtn", "adapters.first.init=zero"), ("rtn", 512, "zero")),
        ("fast", (), ("search", 0, "zero")),
        ("balanced", ("adapters.0.dora=true",), ("gptq", 0, "zero")),
        ("balanced", ("base.solver=keep",), ("keep", 0, "zero")),
    ],
)
def test_presets_fill_in_what_the_recipe_does_not_set(
    recipe_for, preset, changes, expected
) -> None:
    recipe = load_recipe(recipe_for(preset=preset), changes)
    first = recipe.adapters[0]
    assert (recipe.base.solver, recipe.base.tuning.steps, first.init) == expected
    assert recipe.export.targets == (["onnx_each"] if first.dora else ["onnx"])
    if preset == "best":
        assert [part.text for part in recipe.base.calibration] == ["job", "model"]


@pytest.mark.parametrize(("grid", "share"), [("w2-block32-asymmetric", 1), ("w3-block64", 0.5)])
def test_at_2_bits_all_ranks_carry_the_correction(grid: str, share: float, recipe_for: Any) -> None:
    recipe = load_recipe(recipe_for(preset="balanced"), (f"base.weights={grid}",))
    assert recipe.init_share(recipe.adapters[0]) == share
    assert recipe.init_share(recipe.adapters[0].model_copy(update={"init_share": 0.25})) == 0.25


def test_a_rule_without_weights_has_those_of_the_base(recipe_for: Any) -> None:
    rules = "[{match: a, solver: rtn}, {match: b, weights: w8-tensor}, {match: c, keep: float}]"
    changes = ("base.weights=w2-block32-asymmetric", f"base.rules={rules}")
    recipe = load_recipe(recipe_for(), changes)
    schemes = [Scheme(2, False, PerBlock(32)), Scheme(8), None]
    assert [rule.scheme for rule in recipe.base.layer_rules()] == schemes


@pytest.mark.parametrize(
    ("targets", "bitwidths"),
    [("[onnx]", {2, 3, 4, 5, 6, 7, 8}), ("[mlx, hf]", {2, 3, 4, 5, 6, 8}), ("[gguf]", {4, 5, 8})],
)
def test_a_budget_chooses_from_what_all_targets_hold(recipe_for, targets, bitwidths) -> None:
    recipe = load_recipe(recipe_for(), ("base.size=1.5GB", f"export.targets={targets}"))
    schemes = recipe.budget_schemes()
    assert {scheme.bitwidth for scheme in schemes} == bitwidths
    assert len(schemes) == 3 * len(bitwidths), "blocks of 32, 64 and 128"
    assert recipe.base.bytes == 1.5e9
    grids = ("base={bits: 4, weights: w4-block32-asymmetric}", "export.targets=[hf]")
    (found,) = problems(recipe_for(), *grids)  # which no folder holds together
    assert re.search(r"base\.bits.* target hf: .*only if all layers have it", found)


def test_paths_are_relative_to_the_folder_of_the_recipe(recipe_for, tmp_path, monkeypatch) -> None:
    for folder in ("texts", "elsewhere/own", "first"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "elsewhere")  # and its parent is not texts
    path = recipe_for()
    changes = ("data.source=texts", "adapters.0={name: a, continue_from: texts}")
    for folder, name in (("elsewhere", path), (".", Path("recipe.yaml"))):
        monkeypatch.chdir(tmp_path / folder)
        recipe = load_recipe(name, changes)
        assert recipe.data.source == recipe.adapters[0].continue_from == str(tmp_path / "texts")
    for longer, same in ("elsewhere/../texts", "texts"), ("texts/link/../texts",) * 2:
        assert load_recipe(path, (f"data.source={longer}",)).data.source == str(tmp_path / same)
    adapters = "adapters=[{name: first}, {name: b, continue_from: first}]"  # not the folder
    assert load_recipe(path, (adapters,)).adapters[1].continue_from == "first"
    monkeypatch.chdir(tmp_path / "elsewhere")
    (found,) = problems(path, "data.source=own")
    assert f"looked for {tmp_path / 'own'}). Give elsewhere/own" in found


# YAML


NUMBERS = {"012": 12, "0o14": 12, "0x1F": 31, "-3": -3, "5e-4": 5e-4, ".5": 0.5}
OTHERS = {"true": True, "~": None, "": None}
WORDS_OF_1_1 = ("1:30", "yes", "OFF", "2024-01-31", "1_000", "0b11")
"""Numbers, truth values and dates to YAML 1.1, text to the core schema of 1.2."""
STRINGS = (*NUMBERS, *OTHERS, *WORDS_OF_1_1, "=", "<<", "null", "1e5", ".inf")


def test_a_scalar_is_what_the_core_schema_says(recipe_for: Any) -> None:
    for text, value in (NUMBERS | OTHERS | {word: word for word in WORDS_OF_1_1}).items():
        found = load_yaml(f"key: {text}")["key"]
        assert (found, type(found)) == (value, type(value))
    assert load_recipe(recipe_for(), ("seed=012",)).seed == 12


@pytest.mark.parametrize("text", STRINGS)
def test_a_string_reads_back_as_a_string_by_1_1_and_by_1_2(text: str) -> None:
    assert load_yaml(dump_yaml([text])) == yaml.safe_load(dump_yaml([text])) == [text]


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("seed: 1\n# a comment\nseed: 2", "'seed' appears twice, in lines 1 and 3"),
        ("- 1", "is not a mapping of sections"),
        ("a: 1\nb: [\nc: 2", "line 3: the bracket opened in line 2 is not closed"),
        ("a: 'x\n", "line 2: the quote opened in line 1 is not closed"),
        ("a:\n\tb: 1", "line 2: a tab"),
        ("a: b: 1", "line 1: a second colon"),
        ("a:\n  b: 1\n c: 2", "line 3: the indentation"),
        ("a: *b", "line 1: recipes cannot use this YAML"),
        ("a: 1\n---\nb: 1", "a second document"),
        ("a: 1\nb: \x07", "line 2: recipes cannot use this YAML"),
        ("[" * 5000, "nested too deeply"),
        ("seed: " + "9" * 5000, "5000 digits"),
        ("seed: 0x" + "f" * 5000, "5002 digits"),
        ("seed: !!int many", "does not fit its tag"),
        ("seed: !!timestamp 2024-13-99", "does not fit its tag"),
        ("seed: !!python/object:os.system x", "line 1: recipes cannot use this YAML"),
        ("name: x\n# caf\xe9\n", "recipe.yaml:2: byte 6"),
    ],
)
def test_yaml_that_cannot_be_used_is_one_problem(tmp_path: Path, text: str, fact: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(text.encode("latin-1"))
    (problem,) = problems(tmp_path / "recipe.yaml")
    assert fact in problem


def test_merge_keys_are_no_repetition() -> None:
    text = "base: &base {rank: 4, alpha: 8}\nother: {<<: *base, rank: 2}"
    assert load_yaml(text)["other"] == {"rank": 2, "alpha": 8}
