"""report.html and the state of a run in results.json, over a job of fake stages."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from conftest import byte_tokenizer, tiny_model
from pipeline.conftest import FakeJob
from qwlora.errors import (
    DirectoryError,
    QwloraWarning,
    RecipeError,
    TrainingError,
    VerificationError,
)
from qwlora.pipeline.results import read_job, rebuild_reports
from qwlora.pipeline.stages.model_stages import _answers
from qwlora.pipeline.store import STAGE
from qwlora.report.verdict import VerdictKind, verdict
from qwlora.system.progress import untracked
from qwlora.system.stop_signals import Stopped
from qwlora.targets.proof.checks import at_most


def results(job: FakeJob) -> dict[str, Any]:
    return json.loads((job.out / "results.json").read_text())


def page(job: FakeJob) -> str:
    return (job.out / "report.html").read_text()


def test_the_report_follows_the_stages(job: FakeJob) -> None:
    seen: list[str] = []

    def look(stage: str) -> None:
        run = results(job)["run"]
        assert (run["state"], run["stage"]) == ("running", stage)
        assert 'http-equiv="refresh"' in page(job)
        assert (job.out / "recipe.yaml").is_file()
        seen.append(stage)

    job.on_stage = look
    returned = job.run()
    assert returned == results(job)
    run = returned["run"]
    assert (run["state"], run["plan"]) == ("finished", seen)
    assert 'http-equiv="refresh"' not in page(job)
    parts = {n: p for s in returned["stages"].values() for n, p in s["parts"].items()}
    assert parts.keys() == {*seen}
    assert all(part["peak_rss_bytes"] > 0 and part["started"] for part in parts.values())
    files = [f for f in (job.out / "base").rglob("*") if f.is_file() and f.name != STAGE]
    assert returned["sizes"]["base"] == sum(f.stat().st_size for f in files)


ENDS = (TrainingError("training diverged at <step> 3"), Stopped(15, "stopped after step 3"))


@pytest.mark.parametrize("raised", ENDS, ids=repr)
def test_a_run_that_ends_early_says_so(job: FakeJob, raised: BaseException) -> None:
    state = "failed" if isinstance(raised, TrainingError) else "interrupted"
    job.errors["train/first"] = raised
    with pytest.raises(type(raised)):
        job.run()
    found, html = results(job), page(job)
    assert found["run"]["state"] == state
    assert f"{state if state == 'interrupted' else 'stopped'} in stage train/first" in html
    if state == "failed":
        error = found["error"]
        assert (error["class"], error["stage"]) == ("TrainingError", "train/first")
        documented, _, section = error["docs"].partition("#")
        headings = (Path(__file__).parents[2] / documented).read_text().lower().splitlines()
        assert f"## {section}" in headings
        assert "diverged at &lt;step&gt; 3" in html
    job.errors.clear()
    assert "error" not in job.run()
    assert job.run("evaluate")["run"] == results(job)["run"]


def test_a_report_that_fails_stops_no_job(job: FakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    render = Mock(side_effect=ZeroDivisionError("no layers"))
    monkeypatch.setattr("qwlora.pipeline.results.render", render)
    with pytest.warns(QwloraWarning, match="ZeroDivisionError: no layers"):
        assert job.run()["run"]["state"] == "finished"


@pytest.mark.parametrize("target", ["qairt", "onnx", "hf"])
def test_an_untouched_job_is_finished(job: FakeJob, target: str) -> None:
    job.run(changes=[f"export.targets=[{target}]", "simulation.residual_adds=quantize"])
    assert (read_job(job.out).state, read_job(job.out).stale) == ("finished", {})


def test_a_file_that_changed_after_the_check_makes_the_proof_stale(job: FakeJob) -> None:
    job.run()
    (job.out / "export" / "onnx" / "first" / "weights.bin").write_bytes(b"other")
    found = read_job(job.out)
    ((stale, reason),) = found.stale.items()
    assert stale == ("onnx", "first")
    assert "weights.bin has changed" in reason
    assert found.state == "finished"
    assert verdict(found).kind is VerdictKind.NOT_PROVEN
    shutil.rmtree(job.out / "adapters" / "first")
    found = read_job(job.out)
    assert (found.state, verdict(found).kind) == ("incomplete", VerdictKind.NONE_YET)


def test_results_json_is_written_and_never_read(job: FakeJob, tmp_path: Path) -> None:
    job.run()
    first, other = page(job), Path(shutil.copytree(job.out, tmp_path / "other"))
    for content in ('{"perplexity": {"float": 4321.5}}', "[1", None):
        for folder in (job.out, other):
            (folder / "report.html").write_text("old")
            (folder / "results.json").unlink(missing_ok=True)
            if content is not None:
                (folder / "results.json").write_text(content)
        assert rebuild_reports([job.out, other]) == [f / "report.html" for f in (job.out, other)]
        assert page(job) == first
        assert (other / "report.html").read_text() != "old"


def test_an_edited_recipe_leaves_out_what_no_longer_belongs_to_it(job: FakeJob) -> None:
    job.run()
    before, recipe = read_job(job.out).results, job.out / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("rank: 4", "rank: 5"))
    found = read_job(job.out)
    assert before["train/first"] == {"measured": 1}
    assert "train/first" not in found.results
    assert "quantize" in found.results
    assert (found.state, verdict(found).kind) == ("incomplete", VerdictKind.NONE_YET)


def test_what_a_failed_check_measured_stays_in_the_report(job: FakeJob) -> None:
    row = at_most("difference of a logit", 2.0, 1.0, "nats")
    measured = {"first": {"passed": False, "problems": [row.sentence], "checks": [asdict(row)]}}
    parity = {"parity": {"onnx": measured}}
    error = VerificationError("export/onnx/first", [row.sentence], parity)
    job.errors["verify/onnx/first"] = error
    with pytest.raises(VerificationError):
        job.run()
    (job.out / "results.json").unlink()
    found = read_job(job.out)
    assert found.state == "failed"
    assert verdict(found).kind is VerdictKind.DO_NOT_SHIP
    assert row.sentence in verdict(found).sentence
    (job.out / ".qwlora" / "status.json").unlink()
    assert verdict(read_job(job.out)).kind is VerdictKind.DO_NOT_SHIP


def test_a_folder_that_is_no_job_is_refused(tmp_path: Path, job: FakeJob) -> None:
    for folder in (tmp_path / "out", tmp_path):
        with pytest.raises(DirectoryError, match=r"not a job directory|no results yet"):
            rebuild_reports([folder])
    job.run()
    (job.out / "recipe.yaml").write_text("a: [")
    with pytest.raises(RecipeError):
        rebuild_reports([job.out])


def test_a_model_that_cannot_answer_does_not_stop_a_job() -> None:
    text: Any = SimpleNamespace(prompts=lambda _: iter([("why", torch.tensor([1, 2]))] * 4))
    context: Any = SimpleNamespace(tokenizer=byte_tokenizer(), track=untracked)
    model: Any = tiny_model("llama", layers=1)
    assert [said["prompt"] for said in _answers(context, model, text)] == ["why"] * 3
    model.generate = lambda **inputs: 1 / 0
    with pytest.warns(QwloraWarning, match="ZeroDivisionError"):
        assert _answers(context, model, text) == []
    model.can_generate = lambda: False
    assert _answers(context, model, text) == []
