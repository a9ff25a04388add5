"""The verdict of the report: its rules, in their order, and its sentence."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qwlora.report.checks import Outcome
from qwlora.report.number_format import MINUS
from qwlora.report.page import render
from qwlora.report.remedies import remedies, remedy_command
from qwlora.report.results_view import Job
from qwlora.report.verdict import Kind, verdict
from report.recorded import check_of, failing, job_of, results_of, running


def finished(**changes: Any) -> dict[str, Any]:
    """Results of a job whose checks all pass, with changes by dotted key."""
    results = results_of("finished")
    results["parity"]["onnx"]["first"]["tokens"] = 4096
    for key, value in changes.items():
        put(results, key.split("__"), value)
    return results


def put(results: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        results = results.setdefault(key, {})
    results[path[-1]] = value


PARITY = "parity__onnx__first__"
CASES: dict[str, tuple[dict[str, Any], Kind, str]] = {
    "all passed": ({}, Kind.SHIP, "beats the float model by 86.7%"),
    "running": ({"run__state": "running"}, Kind.NONE_YET, "No verdict yet"),
    "running, a check failed": (
        {"run__state": "running", f"{PARITY}passed": False},
        Kind.NONE_YET,
        "No verdict yet",
    ),
    "incomplete": ({"run__state": "incomplete"}, Kind.NONE_YET, "not complete"),
    "interrupted": (
        {"run__state": "interrupted", "run__stage": "train/first"},
        Kind.NONE_YET,
        "interrupted in stage train/first",
    ),
    "failed for another reason": (
        {f"{PARITY}passed": False, f"{PARITY}problems": ["the file is <odd>"]},
        Kind.DO_NOT_SHIP,
        "the file is <odd>",
    ),
    "a stage crashed": (
        {"run__state": "failed", "error__stage": "export/onnx/first", "parity": {}},
        Kind.DO_NOT_SHIP,
        "stopped in stage export/onnx/first",
    ),
    "no proof": ({"parity": {}}, Kind.NOT_PROVEN, "was not checked in ONNX Runtime"),
    "no better than float": (
        {"perplexity__simulated__first": 420.0},
        Kind.WITH_CARE,
        f"not clearly better than the float model on held-out text ({MINUS}0.25%)",
    ),
    "worse than float": (
        {"perplexity__simulated__first": 500.0},
        Kind.WITH_CARE,
        "the adapter is 18.8% worse than the float model",
    ),
    "better by less than 2 standard errors": (
        {"perplexity_ratio__simulated__first": {"value": 0.133, "stderr": 0.5}},
        Kind.WITH_CARE,
        "not clearly better",
    ),
    "better by less than 1%, but by 2 standard errors": (
        {
            "perplexity__simulated__first": 418.0,
            "perplexity_ratio__simulated__first": {"value": 0.9928, "stderr": 0.001},
        },
        Kind.SHIP,
        "beats the float model by 0.72%",
    ),
    "few tokens": ({f"{PARITY}tokens": 999}, Kind.WITH_CARE, "checked on 999 tokens only"),
}


@pytest.mark.parametrize("case", CASES)
def test_rules_apply_in_order(case: str) -> None:
    changes, kind, words = CASES[case]
    found = verdict(job_of("finished", finished(**changes)))
    assert found.kind is kind
    assert words in found.sentence
    assert found.sentence.endswith(".")


PERPLEXITY, TOKENS = "difference of perplexity", "tokens with the same likeliest"
LAYER, MEAN = "difference of layer", "largest mean difference"


@pytest.mark.parametrize(
    ("what", "value", "shown"),
    [
        (PERPLEXITY, 0.1085, "difference of perplexity: 10.85% (limit: at most 0.30%)"),
        (LAYER, 3.0, "the worst of 164: 3 steps (limit: at most 2 steps)"),
        (TOKENS, 0.9, "likeliest next token: 90.00% (limit: at least 97.09%)"),
        ("switching adapters", False, "switching adapters between tokens changes nothing: no"),
        (MEAN, None, "largest mean difference of a layer: not finite"),
    ],
)
def test_a_row_that_failed_is_the_sentence_of_the_verdict(
    what: str, value: Any, shown: str
) -> None:
    found = verdict(job_of("finished", failing(finished(), what, value)))
    assert found.kind is Kind.DO_NOT_SHIP
    assert shown in found.sentence
    found = verdict(job_of("finished", failing(finished(), what, True, "base")))
    assert found.kind is Kind.DO_NOT_SHIP
    assert "the files do not compute the base without an adapter" in found.sentence


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "0.001", []])
@pytest.mark.parametrize("key", ["value", "limit"])
@pytest.mark.parametrize("what", [PERPLEXITY, TOKENS, LAYER, MEAN])
@pytest.mark.parametrize("case", ["first", "base"])
def test_a_proof_without_a_finite_number_for_each_limit_does_not_ship(
    case: str, what: str, key: str, value: Any
) -> None:
    results = finished()
    check_of(results, what, case)[key] = value
    assert verdict(job_of("finished", results)).kind is Kind.NOT_PROVEN


@pytest.mark.parametrize("passed", [None, "true", 1, False])
def test_a_row_that_does_not_say_that_it_passed_does_not_ship(passed: Any) -> None:
    results = finished()
    check_of(results, LAYER)["passed"] = passed
    assert verdict(job_of("finished", results)).kind is Kind.DO_NOT_SHIP


@pytest.mark.parametrize("case", ["first", "base"])
@pytest.mark.parametrize("passed", [None, "true", 1, 0])
def test_only_a_proof_that_passed_ships(passed: Any, case: str) -> None:
    found = verdict(job_of("finished", finished(**{f"parity__onnx__{case}__passed": passed})))
    assert found.kind is Kind.NOT_PROVEN


@pytest.mark.parametrize(
    "parity", [{"x": 1}, {"passed": True}, {"passed": True, "checks": []}, {"checks": [1]}]
)
def test_a_proof_without_rows_does_not_ship(parity: dict[str, Any]) -> None:
    found = verdict(job_of("finished", finished(parity={"onnx": {"first": parity}})))
    assert found.kind is Kind.NOT_PROVEN


@pytest.mark.parametrize("case", ["none", "first+second"])
def test_a_use_case_that_fails_or_was_not_checked_counts(case: str) -> None:
    good = finished()["parity"]["onnx"]["first"]
    job = job_of("finished", finished(parity={"qairt": {"first": good, case: good}}))
    recipe = {**job.recipe, "export": {"targets": ["qairt"]}}
    assert verdict(Job(job.results, recipe, "", "job")).kind is Kind.SHIP
    for changes, kind in (
        ({"passed": False}, Kind.DO_NOT_SHIP),
        ({"checks": []}, Kind.NOT_PROVEN),
    ):
        parity = {"qairt": {"first": good, case: {**good, **changes}}}
        job = job_of("finished", finished(parity=parity))
        assert verdict(Job(job.results, recipe, "", "job")).kind is kind


def test_files_that_changed_after_the_check_are_not_proven() -> None:
    job = job_of("finished", finished(), stale={("onnx", "first"): "model.onnx has changed"})
    found = verdict(job)
    assert found.kind is Kind.NOT_PROVEN
    assert "changed after the check" in found.sentence
    assert not any(c.outcome is Outcome.PASSED and "step" in str(c.what) for c in found.checks)


def test_files_without_activations_are_compared_with_the_trained_model() -> None:
    proof = {**finished()["parity"]["onnx"]["first"], "of": "trained"}
    job = job_of("finished", finished(parity={"hf": {"first": proof}}))
    job = Job(job.results, {**job.recipe, "export": {"targets": ["hf"]}}, "", "job")
    found = verdict(job)
    assert found.kind is Kind.SHIP
    assert "computes what you trained" in found.sentence
    assert "transformers" in render(job)
    assert "has the logits of the trained model" in render(job)


def test_files_that_were_written_but_not_run_are_not_proven() -> None:
    job = job_of("finished", finished(parity={"mlx": {"first": {"not_run": "mlx is missing"}}}))
    job = Job(job.results, {**job.recipe, "export": {"targets": ["mlx"]}}, "", "job")
    found = verdict(job)
    assert found.kind is Kind.NOT_PROVEN
    assert "was not checked in MLX" in found.sentence
    assert "mlx is missing" in render(job)


def test_a_recipe_without_targets_is_not_proven() -> None:
    job = job_of("finished", finished(parity={}))
    empty = {**job.recipe, "export": {"targets": []}}
    found = verdict(Job(job.results, empty, "", "job"))
    assert found.kind is Kind.NOT_PROVEN
    assert "no export target" in found.sentence


def test_what_was_not_measured_is_named_and_never_counts_as_passed() -> None:
    found = verdict(job_of("finished", finished(kl={})))
    assert found.sentence.endswith("but KL divergence and task accuracy were not measured.")
    measured = finished(kl={"base": {"mean": 0.1}}, tasks={"float": {"arc": {"value": 0.5}}})
    assert "not measured" not in verdict(job_of("finished", measured)).sentence
    missing = verdict(job_of("finished", finished(parity={}))).checks
    assert any(check.outcome is Outcome.MISSING for check in missing)


def test_adapters_with_equal_losses_are_called_identical() -> None:
    results = results_of("two")
    for name in ("words", "digits"):
        results["parity"]["onnx"][name]["tokens"] = 4096
    assert verdict(job_of("two", results)).kind is Kind.SHIP
    results["train"]["digits"]["losses"] = results["train"]["words"]["losses"]
    found = verdict(job_of("two", results))
    assert found.kind is Kind.WITH_CARE
    assert "but words and digits are identical" in found.sentence


def test_one_adapter_of_two_that_fails_stops_both() -> None:
    results = results_of("two")
    failing(results, LAYER, 7.0, "digits")
    found = verdict(job_of("two", results))
    assert found.kind is Kind.DO_NOT_SHIP
    assert "digits" in found.sentence
    assert any("1 of 2" in str(check.value) for check in found.checks)


def test_a_running_job_says_how_far_it_is() -> None:
    found = verdict(running(37))
    assert found.sentence == (
        "No verdict yet: training first is at step 37 of 60, and the loss is falling."
    )
    assert found.progress == pytest.approx(37 / 60)


def test_a_running_job_says_how_much_time_is_left_by_the_steps_that_ran() -> None:
    results = {**running(37).results}
    results["run"]["training"]["step_seconds"] = 32.0
    found = verdict(job_of("finished", results))
    assert str(found.below).startswith("About 12 min of training left. ")


def test_a_recorded_failure_says_what_to_do() -> None:
    job = job_of("failed")
    words = " ".join(map(str, remedies(job)))
    parity = job.section("parity", "onnx", "first")
    assert parity["worst_layer"] in words
    assert "export/onnx/first" in words
    assert remedy_command(job) == job.command


def test_a_small_drift_on_few_sequences_asks_for_more_text() -> None:
    results = results_of("failed")
    check_of(results, LAYER)["passed"] = True
    failing(results, PERPLEXITY, 0.6)
    job = job_of("failed", results)
    assert "1 sequences are few" in str(remedies(job)[0])
    assert remedy_command(job).endswith("--set verify.sequences=8")
