"""report.html and the state of a run in results.json, over a job of fake stages."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from conftest import packed_model
from pipeline.conftest import FakeJob
from qwlora.adapter.adapter_deltas import adapter_updates
from qwlora.adapter.attach import LoraShape, attach
from qwlora.errors import (
    DirectoryError,
    QwloraWarning,
    RecipeError,
    TrainingError,
    VerificationError,
)
from qwlora.pipeline.results import COST, JobStatus, described_error, read_job, rebuild_reports
from qwlora.pipeline.store import STAGE
from qwlora.report.verdict import VerdictKind, verdict
from qwlora.system.stop_signals import Stopped
from qwlora.targets.proof.checks import at_most


def results(job: FakeJob) -> dict[str, Any]:
    return json.loads((job.out / "results.json").read_text())


def page(job: FakeJob) -> str:
    return (job.out / "report.html").read_text()


def edit_recipe(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


def failing(stage: str, error: BaseException) -> Callable[[str], None]:
    """Makes a stage of a job raise."""

    def fail(name: str) -> None:
        if name == stage:
            raise error

    return fail


def test_the_report_follows_the_stages(job: FakeJob) -> None:
    seen: dict[str, str] = {}

    def look(stage: str) -> None:
        run = results(job)["run"]
        assert run["stage"] == stage
        assert run["plan"][len(seen)] == stage
        assert 'http-equiv="refresh"' in page(job)
        seen[stage] = run["state"]

    job.on_stage = look
    returned = job.run()
    assert set(seen.values()) == {"running"}
    assert returned == results(job)
    run = returned["run"]
    assert run["state"] == "finished"
    assert run["plan"] == list(seen)
    assert run["machine"].keys() >= {"system", "cores"}
    assert run["command"] == "qwlora run out"
    assert 'http-equiv="refresh"' not in page(job)
    parts = {n: p for s in returned["stages"].values() for n, p in s["parts"].items()}
    assert parts.keys() == seen.keys()
    assert all(part["peak_rss_bytes"] > 0 and part["started"] for part in parts.values())
    files = [f for f in (job.out / "base").rglob("*") if f.is_file() and f.name != STAGE]
    assert returned["sizes"]["base"] == sum(f.stat().st_size for f in files)


def test_a_run_of_some_stages_is_incomplete(job: FakeJob) -> None:
    assert job.run("quantize", "evaluate", "train")["run"]["state"] == "incomplete"
    assert "No verdict yet" in page(job)
    before = job.run()["run"]
    assert job.run()["run"] == before


def test_a_failure_says_what_to_do(job: FakeJob) -> None:
    job.on_stage = failing("train/first", TrainingError("training diverged at <step> 3"))
    with pytest.raises(TrainingError):
        job.run()
    found = results(job)
    assert found["run"]["state"] == "failed"
    error = found["error"]
    assert (error["class"], error["stage"]) == ("TrainingError", "train/first")
    assert error["remedy"][0] == "Correct what the message names."
    assert (Path(__file__).parents[2] / error["docs"]).is_file()
    for words in (error["docs"], "Do not ship", "diverged at &lt;step&gt; 3"):
        assert words in page(job)
    job.on_stage = lambda name: None
    assert "error" not in job.run()
    assert "error" not in results(job)


def test_an_interrupted_run_says_so(job: FakeJob) -> None:
    job.on_stage = failing("train/first", Stopped(15, "stopped after step 3"))
    with pytest.raises(KeyboardInterrupt):
        job.run()
    assert results(job)["run"]["state"] == "interrupted"
    assert "interrupted in stage train/first" in page(job)


def test_a_new_job_that_finishes_nothing_leaves_nothing(job: FakeJob) -> None:
    def fail(stage: str) -> None:
        assert (job.out / "report.html").exists()
        raise TrainingError("no")

    job.on_stage = fail
    with pytest.raises(TrainingError):
        job.run()
    assert not job.out.exists()


def test_a_report_that_fails_stops_no_job(job: FakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    render = Mock(side_effect=ZeroDivisionError("no layers"))
    monkeypatch.setattr("qwlora.pipeline.results.render", render)
    with pytest.warns(QwloraWarning, match="ZeroDivisionError: no layers"):
        assert job.run()["run"]["state"] == "finished"
    assert results(job)["run"]["state"] == "finished"


def test_reports_of_several_jobs_are_rebuilt(job: FakeJob, tmp_path: Path) -> None:
    job.run()
    other, first = Path(shutil.copytree(job.out, tmp_path / "other")), page(job)
    reports = [folder / "report.html" for folder in (job.out, other)]
    for report in reports:
        report.write_text("old")
    assert rebuild_reports([job.out, other]) == reports
    assert page(job) == first
    assert reports[1].read_text() != "old"


def test_a_file_that_changed_after_the_check_makes_the_proof_stale(job: FakeJob) -> None:
    job.run()
    assert not read_job(job.out).stale
    (job.out / "export" / "onnx" / "first" / "weights.bin").write_bytes(b"other")
    found = read_job(job.out)
    ((stale, reason),) = found.stale.items()
    assert stale == ("onnx", "first")
    assert "weights.bin has changed" in reason
    assert found.state == "finished"
    assert verdict(found).kind is VerdictKind.NOT_PROVEN
    shutil.rmtree(job.out / "export" / "onnx" / "base")
    assert read_job(job.out).state == "incomplete"


@pytest.mark.parametrize("target", ["qairt", "onnx", "hf"])
def test_an_untouched_job_is_finished(job: FakeJob, target: str) -> None:
    needed = {"residual_adds": "quantize"}  # by qairt
    edit_recipe(job.recipe, lambda c: c.update(export={"targets": [target]}, simulation=needed))
    job.run()
    assert read_job(job.out).state == "finished"
    assert not read_job(job.out).stale
    shutil.rmtree(job.out / "adapters" / "first")
    found = read_job(job.out)
    assert found.state == "incomplete"
    assert verdict(found).kind is VerdictKind.NONE_YET


@pytest.mark.parametrize("content", ['{"perplexity": {"float": 4321.5}}', "[1", "", None])
def test_results_json_is_written_and_never_read(job: FakeJob, content: str | None) -> None:
    job.run()
    first = page(job)
    (job.out / "results.json").unlink()
    if content is not None:
        (job.out / "results.json").write_text(content)
    rebuild_reports([job.out])
    assert page(job) == first


def test_an_edited_recipe_leaves_out_what_no_longer_belongs_to_it(job: FakeJob) -> None:
    job.run()
    before = read_job(job.out).results
    edit_recipe(job.out / "recipe.yaml", lambda c: c["adapters"][0].update(learning_rate=0.123))
    found = read_job(job.out)
    assert before["train/first"] == {"measured": 1}
    assert "train/first" not in found.results
    assert "quantize" in found.results
    assert found.state == "incomplete"
    assert verdict(found).kind is VerdictKind.NONE_YET


def test_what_a_failed_check_measured_stays_in_the_report(job: FakeJob) -> None:
    row = at_most("difference of a logit", 2.0, 1.0, "nats")
    measured = {"first": {"passed": False, "problems": [row.sentence], "checks": [asdict(row)]}}
    parity = {"parity": {"onnx": measured}}
    error = VerificationError("export/onnx/first", [row.sentence], parity)
    job.on_stage = failing("verify/onnx/first", error)
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
    with pytest.raises(DirectoryError, match="is not a job directory"):
        rebuild_reports([tmp_path / "out"])
    with pytest.raises(DirectoryError, match="has no results yet"):
        rebuild_reports([tmp_path])
    job.run()
    (job.out / "recipe.yaml").write_text("a: [")
    with pytest.raises(RecipeError):
        rebuild_reports([job.out])


def test_training_is_written_so_often_that_it_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("qwlora.pipeline.results.time.monotonic", lambda: clock[0])
    written: list[dict[str, Any]] = []

    def write(keys: dict[str, Any]) -> dict[str, Any]:
        clock[0] += 0.5  # a slow disk
        written.append(keys)
        return keys

    status = JobStatus(write, [], "qwlora run", {})
    status.begin("train/first")
    for step in range(1, 1001):
        clock[0] += 1.0
        status.train(lambda step=step: {"step": step})  # type: ignore[misc]
    spent = 0.5 * (len(written) - 1)
    assert 10 <= len(written) <= 1000 / (0.5 * COST) + 2
    assert spent < 0.011 * clock[0]
    assert written[-1]["run"]["training"]["step"] > 900


def test_an_unknown_error_asks_for_a_report_without_paths_of_the_user() -> None:
    found = described_error(KeyError(f"{Path.home()}/x and {Path.cwd()}/y"), "quantize")
    assert "--debug" in found["remedy"][0]
    assert str(Path.home()) not in found["message"]
    assert "y" in found["message"]
    assert "Free memory" in described_error(MemoryError(), "train/a")["remedy"][0]


def test_updates_of_an_adapter() -> None:
    torch.manual_seed(0)
    model = packed_model("llama", layers=1)
    adapted = attach(model, LoraShape(rank=4, alpha=8.0), 0)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    update = layer.get_delta_weight("default").detach().double()
    found = adapter_updates(adapted)["model.layers.0.self_attn.q_proj"]
    frozen = layer.get_base_layer().tensor.dequantize().double()
    assert found["gain"] == pytest.approx(float(update.norm() / frozen.norm()), rel=1e-4)
