"""Texts of a job: what the base is calibrated on, and what each adapter is trained and measured on."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import text
from pipeline.conftest import stage_keys
from qwlora.adapter.train import train_adapter
from qwlora.data.sequences import IGNORED
from qwlora.errors import RecipeError
from qwlora.pipeline.run import run
from qwlora.pipeline.sources import Sources
from qwlora.pipeline.stages import new_context
from qwlora.recipe import load_recipe
from qwlora.system.progress import untracked

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


def test_each_adapter_learns_its_text(two_texts: Any, tmp_path: Path) -> None:
    """And is measured on all."""
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
        kinds = (answers["float"], answers["base"], answers["adapted"][name])
        prompts = [[said["prompt"] for said in kind] for kind in kinds]
        assert prompts[0] == prompts[1] == prompts[2]
        assert len(set(prompts[0])) == 3
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


GPTQ = {"solver": "gptq", "calibration_sequences": 6}
RECOVERY = {"name": "back", "objective": "recovery", "rank": 2, "steps": 2, "warmup_steps": 0}


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    (tmp_path / "numbers").mkdir()
    for i in range(5):
        (tmp_path / "numbers" / f"{i}.txt").write_text("".join(map(str, range(i, 99))))
    return tmp_path / "numbers"


def test_a_base_is_calibrated_on_all_of_them(job_for: Any, numbers: Path) -> None:
    own = {"text": "model", "weight": 2, "temperature": 0.7}
    job = job_for("one-layer llama", base={**GPTQ, "calibration": ["job", own, str(numbers)]})
    results = job.run("quantize")
    assert job.done == ["quantize/sample", "quantize"]
    recipe = load_recipe(job.out / "recipe.yaml")
    context = new_context(recipe, Sources(recipe), job.out, untracked)
    ids = context.base_calibration_ids(8)
    written = load_file(job.out / ".qwlora" / "sampled" / "ids.safetensors")["1"]
    assert written.shape == (3, 32)
    places = [int((row == written).all(1).any()) for row in ids]
    assert places == [0, 1, 0, 1, 0, 1, 0, 0]
    digits = [any(map(str.isdigit, context.tokenizer.decode(row[0]))) for row in ids]
    assert [d for d, p in zip(digits, places, strict=True) if not p] == [0, 1, 0, 1, 0]
    assert len(context.calibration()["batches"]) == 4  # of activations: the job's text alone
    other = job.run("quantize", changes=["base.calibration=[job]"])
    assert job.done == ["quantize"]
    assert other["base"]["fingerprint"] != results["base"]["fingerprint"]


def test_text_is_written_only_where_something_reads_it(recipe_for: Any) -> None:
    path = recipe_for(base={"calibration": ["job", "model"]})
    recovery = ("base.solver=rtn", "adapters.0.objective=recovery")
    assert "quantize/sample" not in stage_keys(path, *recovery)
    assert "quantize/sample" in stage_keys(path, *recovery, "base.calibration=[model]")
    assert "quantize/sample" in stage_keys(path, "base.solver=gptq")


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sequences that adapters are trained on."""
    seen: list[Any] = []

    def recorded(model: Any, sequences: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(sequences)
        return train_adapter(model, sequences, *arguments, **options)

    monkeypatch.setattr("qwlora.pipeline.stages.model_stages.train_adapter", recorded)
    return seen


def test_recovery_trains_on_it_without_the_job(job_for, numbers, trained_on) -> None:
    base = {"solver": "rtn", "calibration": ["model", str(numbers)]}
    job = job_for("one-layer llama", base=base, adapters=[RECOVERY])
    job.run("quantize", "train")
    written = load_file(job.out / ".qwlora" / "sampled" / "ids.safetensors")["0"]
    ids = trained_on[0].input_ids
    assert torch.equal(ids[::2], written[: len(ids[::2])])
    changes = ["base.calibration=[job, model]"]
    job.run("quantize", "train", changes=changes, replace=["back"])
    assert not (trained_on[1].input_ids[:, None] == written).all(-1).any()


def test_few_short_records_are_one_short_sequence(job_for, tmp_path, trained_on) -> None:
    """For gptq, tuning and recovery, next to longer sequences of another text."""
    pairs = [{"prompt": f"{i} ", "completion": "abc"} for i in range(3)]  # 6 tokens with the end
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(map(json.dumps, pairs)))
    base = {**GPTQ, "calibration": [str(few), "model"], "tuning": {"steps": 1}}
    data = {"source": str(few), "sequence_tokens": 32}
    job = job_for("one-layer llama", base=base, adapters=[RECOVERY], data=data)
    assert job.run("quantize", "train")["train"]["back"]["steps"] == 2
    assert (trained_on[0].labels != IGNORED).sum(1).tolist() == [12, 32]
