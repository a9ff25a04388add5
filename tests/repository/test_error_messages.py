"""Parts of messages: lists, near names, sizes."""

import pytest

from qwlora.errors import lines, listed, near_names, suggestion

MODEL = [f"model.layers.{i}.mlp.{name}" for i in range(3) for name in ("up_proj", "down_proj")]
WEIGHTS = [f"{name}.weight" for name in MODEL]


def test_lists_name_the_first_and_count_the_rest() -> None:
    assert listed("abc", 3) == "a, b, c"
    assert listed("abcde", 3) == "a, b, c and 2 more"
    assert listed([]) == "none"
    assert lines(["a", "b", "c"], 2) == ["a", "b", "and 1 more"]
    assert lines(["a", "b"], 2) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "names", "near"),
    [
        ("Text", ["id", "text"], "text"),
        ("mesages_column", ["messages_column", "text_column"], "messages_column"),
        ("*.dwn_proj", MODEL, "model.layers.0.mlp.down_proj"),
        ("layers.2.mlp.down_proj.weight", WEIGHTS, "model.layers.2.mlp.down_proj.weight"),
        ("model.layers.1.mpl.up_proj.linear", MODEL, "model.layers.1.mlp.up_proj"),
    ],
)
def test_the_nearest_name_comes_first(name: str, names: list[str], near: str) -> None:
    assert near_names(name, names)[0] == near
    assert suggestion(name, names) == f"; did you mean {near}?"


def test_without_a_near_name_the_known_ones_are_listed() -> None:
    assert near_names("xyz", ["text", "label"]) == []
    assert suggestion("xyz", ["text", "label"]) == "; there are text, label"
