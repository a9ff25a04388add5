"""The table at the end of a run, and sizes in it."""

from typing import Any

import pytest
from markupsafe import escape

from qwlora.errors import size
from qwlora.report.page import render
from qwlora.report.results_view import Job
from qwlora.report.sections.key_figures import tiles
from qwlora.report.summary_table import adapter_rows, summary_rows
from qwlora.report.verdict import Outcome, verdict
from report.recorded import NAMES, job_of, results_of


@pytest.mark.parametrize("name", NAMES)
def test_figures_and_checks_are_those_of_the_report(name: str) -> None:
    job = job_of(name)
    found = list(summary_rows(job))
    labels = [label for label, _ in found]
    for tile in tiles(job):
        assert labels.count(tile.label) == (tile.value is not None)
        if tile.value is not None:
            assert tile.value.striptags() in dict(found)[tile.label]
    evidence = verdict(job).evidence
    for outcome in (Outcome.FAILED, Outcome.CAUTION, Outcome.MISSING):
        assert labels.count(outcome.word) == sum(item.outcome is outcome for item in evidence)
    passed = sum(item.outcome is Outcome.PASSED for item in evidence)
    assert dict(found).get("Passed", "0").split()[0] == str(passed)


@pytest.mark.parametrize(("after", "is_warned"), [(4.0, False), (6.0, True)])
def test_training_without_success_is_said(after: float, is_warned: bool) -> None:
    train = {"steps": 2, "losses": [3.0, 2.0], "step_seconds": 1.0}
    train |= {"peak_rss_bytes": 10**9, "trainable_parameters": 5}
    results: dict[str, Any] = {"recipe": "tiny", "stages": {}, "train": {"a": train}}
    results["perplexity"] = {"base": 5.0, "adapted": {"a": after}}
    titles = [title for title, _ in summary_rows(Job(results, {}, "", "tiny"))]
    assert ("Warning" in titles) == is_warned


@pytest.mark.parametrize("name", NAMES)
def test_each_adapter_is_a_row_with_the_loss_of_the_page(name: str) -> None:
    job = job_of(name)
    rows, html = adapter_rows(job), render(job)
    assert [row["adapter"] for row in rows] == job.adapters
    for row in rows:
        losses = job.get("train", row["adapter"], "losses")
        part = len(losses) // 5
        ends = [f"{sum(steps) / part:.3f}" for steps in (losses[:part], losses[-part:])]
        assert row["loss"] == " to ".join(ends)
        assert f"mean of {part} steps: from {ends[0]} to {ends[1]} over" in html
        assert size(job.results["sizes"][f"adapters/{row['adapter']}"]) in row["files"]
        assert "against the float model" in row["change"]


@pytest.mark.parametrize("settings", [{}, {"continue_from": "elsewhere"}])
def test_an_adapter_without_steps_is_called_what_it_is(settings: dict[str, str]) -> None:
    results = results_of("two")
    results["train"]["digits"] |= {"steps": 0, "losses": [], "settings": settings}
    job, word = job_of("two", results), "imported" if settings else "untrained"
    assert adapter_rows(job)[1]["loss"] == word
    assert f"{word.capitalize()} digits" in dict(summary_rows(job))
    html, other = render(job), "untrained" if settings else "imported"
    assert f"It {'was' if settings else 'is'} {word}:" in html
    assert f"digits, {word}" in html
    assert other not in html


@pytest.mark.parametrize(
    ("results", "shown"),
    [
        ({"data": {"cautions": ["9% of <it>"]}}, "9% of <it>"),
        ({"texts": {"a": {"cautions": ["9% of <it>"]}, "b": {"cautions": []}}}, "a: 9% of <it>"),
    ],
)
def test_missing_data_is_at_the_top(results: dict[str, Any], shown: str) -> None:
    job = Job({"recipe": "tiny", "stages": {}, "train": {}, **results}, {}, "", "tiny")
    assert ("Missing data", shown) in summary_rows(job)
    assert f"<p>{escape(shown)}.</p>" in render(job)
