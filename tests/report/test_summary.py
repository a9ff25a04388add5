"""The table at the end of a run, and sizes in it."""

from typing import Any

import pytest

from qwlora.errors import size
from qwlora.report.key_figures import tiles
from qwlora.report.results_view import Job
from qwlora.report.summary_table import base_costs, summary_rows
from qwlora.report.verdict import Outcome, verdict
from report.recorded import NAMES, failing, job_of, results_of


def rows(**parts: Any) -> list[tuple[str, str]]:
    return list(summary_rows(Job({"recipe": "tiny", "stages": {}, **parts}, {}, "", "tiny")))


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


def test_a_check_that_failed_is_said_with_its_limit() -> None:
    results = failing(results_of("finished"), "difference of perplexity", 0.5)
    said = dict(summary_rows(job_of("finished", results)))["Failed"]
    assert "ifference of perplexity" in said
    assert ": 50.00% (at most " in said


def test_the_course_of_training_is_of_means() -> None:
    """Single steps differ more than training changes them."""
    train = {"steps": 10, "losses": [2.8, 3.0, *[2.7] * 6, 2.2, 3.2], "step_seconds": 1.0}
    train |= {"peak_rss_bytes": 10**9, "trainable_parameters": 5}
    found = rows(train={"first": train})
    assert ("Training first", "10 steps, loss 2.900 to 2.700 (means of 2 steps)") in found
    assert "Warning" not in dict(found)


def test_what_the_base_costs_on_another_text_is_said() -> None:
    ratio = {"base": {"value": 1.0536, "stderr": 0.0031, "document_stderr": None}}
    kl = {"base": {"mean": 0.09119, "stderr": 0.0021, "document_stderr": None, "p999": 1.5}}
    results = {"perplexity_ratio": {"on": {"legal": ratio}}, "kl": {"on": {"legal": kl}}}
    cost = "+5.4% ± 0.3% perplexity over float, KL 0.0912 ± 0.0021"
    assert dict(base_costs(results))["base on the text of legal"] == cost


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0.0 kB"), (45_678, "45.7 kB"), (100_000, "100.0 kB"), (1_234_567_890, "1.2 GB")],
)
def test_sizes_do_not_round_to_nothing(count: int, words: str) -> None:
    assert size(count) == words
