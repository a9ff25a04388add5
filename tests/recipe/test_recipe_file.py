"""Values of the wrong type, and paths that no file system holds, are problems of the recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwlora.errors import RecipeError
from qwlora.recipe import load_recipe
from qwlora.recipe.dropped_keys import DROPPED_KEYS

LONG = "x" * 5000


def problems(path: Path, *changes: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, changes)
    return list(caught.value.problems)


@pytest.mark.parametrize("value", ["[a]", "{a: b}", "2024-01-31T00:00:00", "x" * 300, "3"])
def test_a_name_that_cannot_be_one_names_its_key(recipe_for: Any, value: str) -> None:
    assert problems(recipe_for(), f"name={value}")[0].startswith("name: ")
    found = problems(
        recipe_for(), f"adapters.0.name={value}", "adapters.0.continue_from=first/second"
    )
    assert found[0].startswith("adapters.0.name: ")


@pytest.mark.parametrize(
    "key", ["model.source", "model.encodings", "data.source", "data.chat_template"]
)
@pytest.mark.parametrize(
    ("value", "fact"), [("~nouser/x", "home directory"), (f"/{LONG}", "too long")]
)
def test_a_path_that_cannot_be_one_names_its_key(
    recipe_for: Any, key: str, value: str, fact: str
) -> None:
    found = next(p for p in problems(recipe_for(), f"{key}={value}") if p.startswith(key))
    assert fact in found
    assert len(found) < 600


def test_a_start_that_cannot_be_a_path_names_its_key(recipe_for: Any) -> None:
    found = problems(recipe_for(), f"adapters.0.continue_from=/{LONG}")[0]
    assert found.startswith("adapters.0.continue_from: ")
    assert "too long" in found


def test_a_template_that_is_not_utf8_names_its_line(recipe_for: Any, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_bytes(b"{{ messages }}\n\xff")
    (found,) = problems(recipe_for(), f"data.chat_template={tmp_path / 'chat.jinja'}")
    assert "chat.jinja:2" in found
    assert "UTF-8" in found


def in_recipe(key: str) -> str:
    """Where a key is in a recipe: keys of adapters are in the items of a list."""
    return key.replace("adapters.", "adapters.0.")


def test_a_dropped_key_at_its_default_is_ignored(recipe_for: Any) -> None:
    changes = [f"{in_recipe(key)}={json.dumps(d)}" for key, d in DROPPED_KEYS.items()]
    assert load_recipe(recipe_for(), tuple(changes)) == load_recipe(recipe_for())


@pytest.mark.parametrize("key", DROPPED_KEYS)
def test_a_dropped_key_with_another_value_is_refused(recipe_for: Any, key: str) -> None:
    (found,) = problems(recipe_for(), f"{in_recipe(key)}=0.25")
    assert re.fullmatch(rf"{in_recipe(key)}: is 0.25, .* no longer exists.*", found)


def test_a_renamed_key_is_refused_with_its_new_name(recipe_for: Any) -> None:
    (found,) = problems(recipe_for(), "adapters.0.start=owner/adapter")
    assert found.startswith("adapters.0.start: ")
    assert "continue_from" in found


def test_a_renamed_key_that_is_null_as_older_jobs_wrote_it_is_ignored(recipe_for: Any) -> None:
    assert load_recipe(recipe_for(), ("adapters.0.start=null",)) == load_recipe(recipe_for())
