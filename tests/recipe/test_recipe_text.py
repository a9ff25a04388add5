"""How recipe.yaml of a job is changed: only what differs, so that comments and order stay."""

import difflib
import re
from pathlib import Path

import pytest

from qwlora.errors import DirectoryError, RecipeError
from qwlora.recipe import load_recipe
from qwlora.recipe.recipe_text import edited, written

FIRST = "  - {name: first, steps: 30}  # one line"
MIXED = "[job, {text: model, weight: 2}]"
TEXT = f"""\
# My job.
name: "job"   # in quotes
adapters:
{FIRST}
  # the second
  - name: second
    steps: 40  # enough
base:
  calibration: {MIXED}
  rules:
    - match: "*.0.*"  # the first layer
      weights: w8-signed32
model: {{source: %s}}
data: {{source: %s}}
"""


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, checkpoints: dict[str, Path]) -> Path:
    (tmp_path / "recipe.yaml").write_text(TEXT % (checkpoints["llama"], corpus))
    return tmp_path / "recipe.yaml"


def lines(recipe: Path, *changes: str) -> list[str]:
    """The lines that a change removes and adds; `edited` has read the new text itself."""
    text = recipe.read_text()
    new = edited(text, load_recipe(recipe), load_recipe(recipe, changes), recipe)
    found = difflib.ndiff(text.splitlines(), new.splitlines())
    return [line for line in found if line[0] in "-+"]


@pytest.mark.parametrize(
    ("change", "gone", "added"),
    [
        ("adapters.1.steps=50", "    steps: 40  # enough", "    steps: 50  # enough"),
        ("seed=7", "", "seed: 7"),
        ("adapters.0.name=other", FIRST, FIRST.replace("first", "other")),
        ("base.calibration=[job]", f"  calibration: {MIXED}", "  calibration:|    - job"),
    ],
)
def test_only_what_differs_is_written(recipe: Path, change: str, gone: str, added: str) -> None:
    expected = [f"- {line}" for line in gone.split("|") if gone]
    assert lines(recipe, change) == expected + [f"+ {line}" for line in added.split("|")]
    assert lines(recipe) == []


def test_adapters_come_and_go(recipe: Path) -> None:
    more = "{name: first, steps: 30}, {name: second, steps: 40}, {name: third, steps: 50}"
    added = lines(recipe, f"adapters=[{more}]")
    assert (added[0], added[-1]) == ("+   - name: third", "+     steps: 50")
    assert all(line.startswith("+") for line in added)
    gone = lines(recipe, "adapters=[{name: second, steps: 40}]")
    assert gone[0] == f"- {FIRST}"
    assert not any(line.startswith("+") for line in gone)


def test_a_text_that_would_read_as_something_else_is_refused(recipe: Path) -> None:
    text = recipe.read_text().replace("- {name: first", "- &few {name: first")
    recipe.write_text(text.replace("steps: 40 ", "<<: *few "))  # both have its steps
    with pytest.raises(DirectoryError, match=r"recipe.yaml' cannot be changed automatically \("):
        lines(recipe, "adapters.0.steps=90")


def test_a_job_keeps_the_text_of_its_recipe(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a")
    text = re.sub("data: {.*}", "data: {source: text.txt}", recipe.read_text())
    recipe.write_text(text)
    asked = load_recipe(recipe, ("adapters.second.steps=50",))
    file = tmp_path / "out" / "recipe.yaml"
    new = written(asked, recipe, file)
    text = text.replace("steps: 40", "steps: 50")
    assert new == text.replace("text.txt", f"{tmp_path}/text.txt")
    text = text.replace("- {name: first", "- &few {name: first")  # an edit would change both
    recipe.write_text(text.replace("steps: 40 ", "<<: *few "))

    for short in (written(asked, recipe, file), written(asked, None, file)):
        assert "warmup" not in short
        (tmp_path / "short.yaml").write_text(short)
        assert load_recipe(tmp_path / "short.yaml") == asked


def test_a_list_that_aliases_repeat_a_billion_times_is_refused_at_once(recipe: Path) -> None:
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]" for i in range(1, 12))]
    recipe.write_text("\n".join([*lines, recipe.read_text(), "seed: *a11\n"]))
    with pytest.raises(RecipeError, match="a11: unknown key"):
        load_recipe(recipe)
