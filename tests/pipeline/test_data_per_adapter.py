"""Adapters with texts of their own: what each is trained, calibrated and measured on."""

import random
from pathlib import Path
from typing import Any

import pytest

from conftest import text
from pipeline.conftest import stage_keys
from qwlora.errors import RecipeError
from qwlora.pipeline.run import run
from qwlora.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("shared_captures")
SETTINGS = {"rank": 4, "steps": 40, "warmup_steps": 1, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two texts with nothing in common: words, and digits."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("words", "digits")}
    digits = random.Random(0)
    for i in range(8):
        (folders["words"] / f"{i}.txt").write_text(text(i, 60))
        (folders["digits"] / f"{i}.txt").write_text("".join(digits.choices("0123456789", k=300)))
    return folders


@pytest.fixture
def two_texts(recipe_for: Any, texts: dict[str, Path]) -> Any:
    """Write a recipe of one adapter per text; the data section has no source."""
    data = {"sequence_tokens": 32, "evaluation_sequences": 4, "calibration_sequences": 3}
    adapters = [{"name": n, "data": {"source": str(path)}, **SETTINGS} for n, path in texts.items()]
    own = {"data": data, "adapters": adapters}
    return lambda **sections: recipe_for("one-layer llama", **{**own, **sections})


def test_each_adapter_learns_its_text_and_is_measured_on_all(
    two_texts: Any, tmp_path: Path
) -> None:
    verbs = ("quantize", "train", "evaluate")
    results = run(load_recipe(two_texts(evaluate="all")), tmp_path / "out", verbs)
    on = results["perplexity"]["on"]
    assert set(on) == set(results["texts"]) == {"words", "digits"}
    for name, other in (("words", "digits"), ("digits", "words")):
        measured = on[name]
        assert measured["adapted"][name] == results["perplexity"]["adapted"][name]
        assert measured["adapted"][name] < 0.9 * measured["base"]
        assert measured["adapted"][name] < 0.9 * measured["adapted"][other]
        errors = results["perplexity_stderr"]
        assert errors["on"][name]["adapted"][name] == errors["adapted"][name]
        answers = results["answers"]["on"][name]
        assert set(answers) == {"float", "base", "adapted"}
        assert answers["adapted"] == {name: results["answers"]["adapted"][name]}
        prompts = [[said["prompt"] for said in answers[kind]] for kind in ("float", "base")]
        assert prompts[0] == prompts[1] == [said["prompt"] for said in answers["adapted"][name]]
        assert len(prompts[0]) == len(set(prompts[0])) == 3
    assert "base" not in results["perplexity"]  # the base has no text of its own
    assert set(results["kl"]) == set(results["top1"]) == {"adapted", "on"}
    for name in ("words", "digits"):  # the cost of packing is known on the text of each adapter
        assert set(results["kl"]["on"][name]) == {"base"}
        assert 0 < results["kl"]["on"][name]["base"]["mean"] < 1


def test_own_text_is_measured_by_default(two_texts: Any) -> None:
    """The float model and the base on all texts, since each adapter is compared with them."""
    names = {n for n in stage_keys(two_texts()) if n.startswith("evaluate/")}
    kinds = ("float/on", "base/on", "adapted", "simulated")
    assert names == {f"evaluate/{kind}/{t}" for kind in kinds for t in ("words", "digits")}


def test_which_text_the_base_sees(two_texts: Any, texts: dict[str, Path], corpus: Path) -> None:
    def sources(**sections: Any) -> list[str | None]:
        return [data.source for data in load_recipe(two_texts(**sections)).base_texts()]

    words, digits = map(str, texts.values())
    assert sources() == [words, digits]
    assert sources(base={"calibrate_on": ["digits"]}) == [digits]
    assert sources(data={"source": str(corpus)}) == [str(corpus)]
    own = {"source": words}, {"source": words, "evaluation_sequences": 2}
    same = [{"name": f"a{i}", "data": data} for i, data in enumerate(own)]
    assert sources(adapters=same) == [words]
    with pytest.raises(RecipeError, match=r"base\.calibrate_on: there is no adapter third"):
        sources(base={"calibrate_on": ["third"]})
