"""The borders of the verdict's rules: each is tried on both sides."""

from __future__ import annotations

from typing import Any

import pytest

from qwlora.report.checks import Outcome
from qwlora.report.results_view import FEW_TOKENS
from qwlora.report.verdict import Kind, Verdict, verdict
from report.recorded import job_of, results_of
from report.test_verdict import finished


def judged(**changes: Any) -> Verdict:
    return verdict(job_of("finished", finished(**changes)))


def gain(reference: str, before: float, after: float, **ratio: float) -> dict[str, Any]:
    """Changes after which an adapter's only comparison is with `reference`."""
    found: dict[str, Any] = {"perplexity": {reference: before, "simulated": {"first": after}}}
    found["perplexity_ratio"] = {"simulated": {"first": ratio}} if ratio else {}
    return found


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        (gain("float", 100.0, 98.9), Kind.SHIP),
        (gain("float", 100.0, 99.1), Kind.WITH_CARE),
        (gain("float", 100.0, 100.0), Kind.WITH_CARE),
        (gain("float", 100.0, 120.0), Kind.WITH_CARE),
        (gain("float", 128.0, 112.0, stderr=0.0625), Kind.SHIP),  # by exactly 2 standard errors
        (gain("float", 128.0, 112.0, stderr=0.0626), Kind.WITH_CARE),
        (gain("float", 128.0, 127.0, stderr=0.001), Kind.SHIP),
        (gain("float", 128.0, 128.0, stderr=0.0), Kind.WITH_CARE),
        (gain("base", 100.0, 99.9), Kind.SHIP),
        (gain("base", 100.0, 100.0), Kind.WITH_CARE),
        (gain("base", 100.0, 120.0), Kind.WITH_CARE),
    ],
)
def test_an_adapter_has_to_gain_more_than_chance(changes: dict[str, Any], kind: Kind) -> None:
    assert judged(**changes).kind is kind


def test_a_gain_that_was_not_measured_is_said() -> None:
    found = judged(perplexity={"simulated": {"first": 90.0}}, perplexity_ratio={})
    assert any(
        check.outcome is Outcome.MISSING and "against the float model" in str(check.what)
        for check in found.checks
    )


@pytest.mark.parametrize(
    ("words", "digits", "kind"),
    [
        (FEW_TOKENS, FEW_TOKENS, Kind.SHIP),
        (FEW_TOKENS - 1, 9 * FEW_TOKENS, Kind.WITH_CARE),
        (9 * FEW_TOKENS, FEW_TOKENS - 1, Kind.WITH_CARE),
        (None, 9 * FEW_TOKENS, Kind.SHIP),
    ],
)
def test_the_adapter_that_was_checked_least_counts(
    words: int | None, digits: int, kind: Kind
) -> None:
    found = verdict(job_of("two", two(words, digits)))
    assert found.kind is kind
    if kind is Kind.WITH_CARE:
        assert f"{FEW_TOKENS - 1} tokens" in found.sentence


def two(words: int | None = 9 * FEW_TOKENS, digits: int | None = 9 * FEW_TOKENS) -> dict[str, Any]:
    results = results_of("two")
    for name, tokens in (("words", words), ("digits", digits)):
        results["parity"]["onnx"][name]["tokens"] = tokens
    return results


@pytest.mark.parametrize("losses", [None, [], "1.0"])
def test_adapters_without_losses_are_not_identical(losses: Any) -> None:
    results = two()
    for name in ("words", "digits"):
        results["train"][name]["losses"] = losses
    assert verdict(job_of("two", results)).kind is Kind.SHIP


@pytest.mark.parametrize("name", ["words", "digits"])
@pytest.mark.parametrize(
    ("proof", "kind"),
    [
        ({}, Kind.NOT_PROVEN),
        ({"not_run": "it is missing"}, Kind.NOT_PROVEN),
        ({"passed": False, "problems": ["wrong"]}, Kind.DO_NOT_SHIP),
    ],
)
def test_every_adapter_has_to_be_proven(name: str, proof: dict[str, Any], kind: Kind) -> None:
    results = two()
    results["parity"]["onnx"][name] = proof
    found = verdict(job_of("two", results))
    assert found.kind is kind
    if kind is Kind.NOT_PROVEN:
        assert f"of {name} " in found.sentence


@pytest.mark.parametrize("name", ["words", "digits"])
def test_files_of_one_adapter_that_changed_are_not_proven(name: str) -> None:
    found = verdict(job_of("two", two(), stale={("onnx", name): "model.onnx has changed"}))
    assert found.kind is Kind.NOT_PROVEN
    assert f"of {name} " in found.sentence


@pytest.mark.parametrize("state", ["running", "interrupted", "incomplete"])
def test_a_job_that_is_not_finished_has_no_verdict(state: str) -> None:
    assert judged(run__state=state).kind is Kind.NONE_YET


def test_a_stage_that_failed_stops_files_that_passed() -> None:
    found = judged(run__state="failed", error__stage="evaluate")
    assert found.kind is Kind.DO_NOT_SHIP
    assert "evaluate" in found.sentence


@pytest.mark.parametrize("after", [100.0, 100.1, 250.0])
def test_no_gain_is_claimed_that_was_not_measured(after: float) -> None:
    found = judged(**gain("float", 100.0, after))
    assert found.sentence.startswith("The exported file computes what you trained, but ")


def gains(words: float, digits: float) -> Verdict:
    results = two()
    results["perplexity"] = {
        "float": 100.0,
        "on": {},
        "simulated": {"words": words, "digits": digits},
    }
    results["perplexity_ratio"] = {}
    for name in ("words", "digits"):
        results["train"][name].pop("text", None)
    return verdict(job_of("two", results))


@pytest.mark.parametrize("swapped", [False, True])
def test_of_several_adapters_the_smallest_gain_is_claimed(swapped: bool) -> None:
    found = gains(*((70.0, 90.0) if swapped else (90.0, 70.0)))
    assert found.kind is Kind.SHIP
    assert "every adapter beats the float model by 10.0% or more" in found.sentence
    found = gains(*((70.0, 110.0) if swapped else (110.0, 70.0)))
    assert found.kind is Kind.WITH_CARE
    assert found.sentence.startswith("Both exported files compute what you trained, but ")
