"""Values of the wrong type, and paths that no file system holds, are problems of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwlora.errors import RecipeError
from qwlora.recipe import load_recipe

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
