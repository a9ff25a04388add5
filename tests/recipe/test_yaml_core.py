"""Recipes follow YAML 1.2, and a key is given once."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwlora.errors import RecipeError
from qwlora.recipe import load_recipe
from qwlora.recipe.yaml_core import dump_yaml, load_yaml

CORE = [
    ("012", 12),
    ("0o14", 12),
    ("0x1F", 31),
    ("-3", -3),
    ("1:30", "1:30"),
    ("yes", "yes"),
    ("OFF", "OFF"),
    ("true", True),
    ("2024-01-31", "2024-01-31"),
    ("1_000", "1_000"),
    ("0b11", "0b11"),
    ("5e-4", 5e-4),
    (".5", 0.5),
    ("~", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "value"), CORE)
def test_a_scalar_is_what_the_core_schema_says(text: str, value: Any) -> None:
    found = load_yaml(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", [*(text for text, _ in CORE), "=", "<<", "null", "1e5", ".inf"])
def test_a_string_reads_back_as_a_string_by_1_1_and_by_1_2(text: str) -> None:
    assert load_yaml(dump_yaml([text])) == [text]
    assert yaml.safe_load(dump_yaml([text])) == [text]


def problem(path: Path, *changes: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, changes)
    (only,) = caught.value.problems
    return only


def test_a_key_given_twice_is_refused_and_merge_keys_are_no_repetition(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 1\n# a comment\nseed: 2")
    assert re.search("'seed'.* lines 1 and 3", problem(tmp_path / "recipe.yaml"))
    text = "base: &base {rank: 4, alpha: 8}\nother: {<<: *base, rank: 2}"
    assert load_yaml(text)["other"] == {"rank": 2, "alpha": 8}


def test_set_follows_the_same_rules(recipe_for: Any) -> None:
    path = recipe_for()
    assert load_recipe(path, ("seed=012",)).seed == 12
    assert "'1:30'" in problem(path, "seed=1:30")
    assert "'yes'" in problem(path, "adapters.0.dora=yes")
    assert "'rank'" in problem(path, "adapters=[{name: a, rank: 1, rank: 2}]")


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("- 1", "is not a mapping of sections"),
        ("a: 1\nb: [\nc: 2", "line 3: the bracket opened in line 2 is not closed"),
        ("a: 'x\n", "line 2: the quote opened in line 1 is not closed"),
        ("a:\n\tb: 1", "line 2: a tab"),
        ("a: b: 1", "line 1: a second colon"),
        ("a:\n  b: 1\n c: 2", "line 3: the indentation"),
        ("a: *b", "line 1: this is not YAML"),
        ("a: 1\n---\nb: 1", "a second document"),
        ("a: 1\nb: \x07", "line 2: this is not YAML"),
        ("[" * 5000, "nested too deeply"),
        ("seed: " + "9" * 5000, "5000 digits"),
        ("seed: 0x" + "f" * 5000, "5002 digits"),
        ("seed: !!int many", "does not fit its tag"),
        ("seed: !!timestamp 2024-13-99", "does not fit its tag"),
        ("seed: !!python/object:os.system x", "line 1: this is not YAML"),
        ("name: x\n# caf\xe9\n", "recipe.yaml:2: byte 6"),
    ],
)
def test_yaml_that_cannot_be_used_is_one_problem(tmp_path: Path, text: str, fact: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(text.encode("latin-1"))
    assert fact in problem(tmp_path / "recipe.yaml")
