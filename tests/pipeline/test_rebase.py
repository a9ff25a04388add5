"""`rebase` gives the adapters of a job another base; the old job stays as it is."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.command_line import qwlora
from conftest import Job
from qwlora.adapter.adapter_files import base_of
from qwlora.adapter.adapter_folder import load_adapter
from qwlora.errors import SourceError
from qwlora.formats.base_folder import load_base
from qwlora.pipeline.commands.open_job import JobModels
from qwlora.pipeline.commands.rebase import rebase, verdict
from qwlora.pipeline.run import run


@pytest.fixture
def old(job_for: Callable[..., Job]) -> Job:
    job = job_for("one-layer llama", export={"targets": ["hf"]})
    job.run("quantize", "train", "evaluate")
    return job


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_adapter_is_measured_on_both_bases_and_trained(old: Job, tmp_path: Path) -> None:
    before, new = content(old.out), tmp_path / "new"
    rows = rebase(old.out, new, 6, run, ("base.weights=w2-block32",))
    assert content(old.out) == before
    measured = old.run("evaluate")["perplexity"]
    row = rows["first"]
    assert row["old_base"] == pytest.approx(measured["base"])
    assert row["old_adapter"] == pytest.approx(measured["adapted"]["first"])
    assert row["new_base"] != row["old_base"]
    assert row["as_it_is"] != row["old_adapter"]
    assert row["rebased"] < row["as_it_is"]
    assert base_of(new / "adapters/first") != base_of(old.out / "adapters/first")
    assert rebase(old.out, new, 6, run, ("base.weights=w2-block32",)) == rows
    other = qwlora("adapters", "rebase", old.out, "--out", new)
    assert (other.returncode, "another base" in other.stderr) == (2, True)


def test_without_its_text_the_old_model_writes_one(old: Job, tmp_path: Path, corpus: Path) -> None:
    new = tmp_path / "new"
    gone = tmp_path / "corpus"
    shutil.copytree(corpus, gone)
    old.run("quantize", "train", changes=[f"data.source={gone}"])
    shutil.rmtree(gone)
    done = qwlora("adapters", "rebase", old.out, "--out", new, "--steps", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new-start/first.jsonl").stat().st_size > 1000
    assert '"rebased"' in done.stdout


def test_the_corrected_adapter_is_closer_to_the_old_model(old: Job, tmp_path: Path) -> None:
    new = tmp_path / "new"
    rebase(old.out, new, 0, run, ("base.weights=w2-block32",))
    ids = JobModels(new).new_context().text("first").evaluation.input_ids[:2]

    def logits(base: Path, adapter: Path) -> torch.Tensor:
        with torch.no_grad():
            model = load_adapter(load_base(base / "base"), adapter, unknown_base="other")
            return model.eval()(ids).logits

    wanted = logits(old.out, old.out / "adapters/first")
    as_it_is = logits(new, old.out / "adapters/first") - wanted
    corrected = logits(new, new / "adapters/first") - wanted
    assert corrected.norm() < 0.9 * as_it_is.norm()


def test_a_mergeable_adapter_is_refused(job_for: Callable[..., Job], tmp_path: Path) -> None:
    job = job_for("one-layer llama")
    job.run("quantize", "train", changes=["adapters.0.mergeable=true"])
    with pytest.raises(SourceError, match="first: a mergeable adapter is tied"):
        rebase(job.out, tmp_path / "new", 2, run)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "words"), [("base.weigts=w2", "base.weights"), ("base.rotation=all", "rotation")]
)
def test_a_wrong_change_leaves_nothing(old: Job, tmp_path: Path, change: str, words: str) -> None:
    new = tmp_path / "new"
    done = qwlora("adapters", "rebase", old.out, "--out", new, "--set", change)
    assert (done.returncode, words in done.stderr) == (2, True)
    assert not new.exists()


@pytest.mark.parametrize(
    ("as_it_is", "rebased", "words"),
    [
        (10.05, 10.05, "without training"),
        (11.0, 10.0, "kept"),
        (12.0, 11.0, "10.0% worse; train more"),
    ],
)
def test_verdicts(as_it_is: float, rebased: float, words: str) -> None:
    row: dict[str, Any] = {"old_adapter": 10.0, "as_it_is": as_it_is, "rebased": rebased}
    assert words in verdict(row)
