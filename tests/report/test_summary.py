"""The table at the end of a run, and sizes in it."""

from typing import Any

import pytest
from markupsafe import escape

from qwlora.report.key_figures import tiles
from qwlora.report.page import render
from qwlora.report.results_view import Job
from qwlora.report.summary_table import summary_rows
from qwlora.report.verdict import Outcome, verdict
from report.recorded import NAMES, job_of


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


@pytest.mark.parametrize(
    ("losses", "after", "warning"),
    [
        ([2.8, 3.0, *[2.7] * 6, 2.2, 3.2], 4.0, ""),  # single steps say little
        ([2, 3], 4.0, ""),
        ([2] * 5 + [3] * 5, 4.0, "did not learn"),
        ([3, 2], 6.0, "no better than the base"),
    ],
)
def test_training_without_success_is_said(losses: list[float], after: float, warning: str) -> None:
    train = {"steps": len(losses), "losses": losses, "step_seconds": 1.0}
    train |= {"peak_rss_bytes": 10**9, "trainable_parameters": 5}
    results: dict[str, Any] = {"recipe": "tiny", "stages": {}, "train": {"a": train}}
    results["perplexity"] = {"base": 5.0, "adapted": {"a": after}}
    found = list(summary_rows(Job(results, {}, "", "tiny")))
    warnings = [text for title, text in found if title == "Warning"]
    assert len(warnings) == bool(warning)
    assert all(warning in text for text in warnings)
    if len(losses) == 10 and not warning:
        assert "loss 2.900 to 2.700 (means of 2 steps)" in dict(found)["Training a"]


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
