"""`base.calibration`: the job's text, other texts, and what the float model writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.conftest import stage_keys
from qwlora.adapter.train import train_adapter
from qwlora.data.sequences import IGNORED
from qwlora.pipeline.sources import Sources
from qwlora.pipeline.stages import new_context
from qwlora.recipe import load_recipe
from qwlora.system.progress import untracked

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
    for changes, is_written in (
        (("base.solver=gptq",), True),
        (("base.solver=rtn",), False),
        (recovery, False),
        ((*recovery, "base.calibration=[model]"), True),
    ):
        assert ("quantize/sample" in stage_keys(path, *changes)) == is_written


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sequences that adapters are trained on."""
    seen: list[Any] = []

    def recorded(model: Any, sequences: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(sequences)
        return train_adapter(model, sequences, *arguments, **options)

    monkeypatch.setattr("qwlora.pipeline.stages.model_stages.train_adapter", recorded)
    return seen


def test_recovery_trains_on_it_without_the_job(
    job_for: Any, numbers: Path, trained_on: list[Any]
) -> None:
    base = {"solver": "rtn", "calibration": ["model", str(numbers)]}
    job = job_for("one-layer llama", base=base, adapters=[RECOVERY])
    job.run("quantize", "train")
    written = load_file(job.out / ".qwlora" / "sampled" / "ids.safetensors")["0"]
    ids = trained_on[0].input_ids
    assert torch.equal(ids[::2], written[: len(ids[::2])])
    changes = ["base.calibration=[job, model]"]
    job.run("quantize", "train", changes=changes, replace=["back"])
    assert not (trained_on[1].input_ids[:, None] == written).all(-1).any()


def test_few_short_records_are_one_short_sequence(
    job_for: Any, tmp_path: Path, trained_on: list[Any]
) -> None:
    """For gptq, tuning and recovery, next to longer sequences of another text."""
    pairs = [{"prompt": f"{i} ", "completion": "abc"} for i in range(3)]  # 6 tokens with the end
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(map(json.dumps, pairs)))
    base = {**GPTQ, "calibration": [str(few), "model"], "tuning": {"steps": 1}}
    data = {"source": str(few), "sequence_tokens": 32}
    job = job_for("one-layer llama", base=base, adapters=[RECOVERY], data=data)
    assert job.run("quantize", "train")["train"]["back"]["steps"] == 2
    assert (trained_on[0].labels != IGNORED).sum(1).tolist() == [12, 32]
