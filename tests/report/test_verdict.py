"""The verdict of the report: its rules, in their order, and its sentence."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qwlora.report.checks import Outcome
from qwlora.report.job import Job
from qwlora.report.page import render
from qwlora.report.remedies import remedies, remedy_command
from qwlora.report.verdict import Kind, verdict
from qwlora.report.written_numbers import MINUS
from report.recorded import job_of, results_of, running


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
    "perplexity too far": (
        {f"{PARITY}perplexity": 60.0, f"{PARITY}passed": False},
        Kind.DO_NOT_SHIP,
        "its perplexity is 10.85% away, and the limit is 0.30%",
    ),
    "a layer too far": (
        {f"{PARITY}worst_layer_steps": 3.0, f"{PARITY}passed": False},
        Kind.DO_NOT_SHIP,
        "one layer is 3.00 steps off, and the limit is 2",
    ),
    "below the noise floor": (
        {f"{PARITY}top1_agreement": 0.9, f"{PARITY}passed": False},
        Kind.DO_NOT_SHIP,
        "it agrees on 90.00% of tokens, below the noise floor of 97.09%",
    ),
    "only the base failed": (
        {"parity__onnx__base__worst_layer_steps": 3.0, "parity__onnx__base__passed": False},
        Kind.DO_NOT_SHIP,
        "the files do not compute the base without an adapter",
    ),
    "wrong with the cache": (
        {f"{PARITY}cache": {"sqnr": 12.0, "least_sqnr": 50.0, "tokens": 16}},
        Kind.DO_NOT_SHIP,
        "with the key-value cache its logits are 12.0 dB from the simulation",
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
    "a limit without a measurement": (
        {f"{PARITY}limits__top_speed": 3.0},
        Kind.NOT_PROVEN,
        "was not checked completely",
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


NO_NUMBERS = (None, math.nan, math.inf, "0.001", [], True)


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize(
    "key",
    [
        "perplexity",
        "simulated_perplexity",
        "worst_layer_steps",
        "worst_layer_mean_steps",
        "top1_agreement",
        "limits__layer_steps",
        "limits__perplexity_difference",
    ],
)
@pytest.mark.parametrize("case", ["first", "base"])
def test_a_proof_without_a_finite_number_for_each_limit_does_not_ship(
    case: str, key: str, value: Any
) -> None:
    found = verdict(job_of("finished", finished(**{f"parity__onnx__{case}__{key}": value})))
    assert found.kind is Kind.NOT_PROVEN


@pytest.mark.parametrize("case", ["first", "base"])
@pytest.mark.parametrize("passed", [None, "true", 1, 0])
def test_only_a_proof_that_passed_ships(passed: Any, case: str) -> None:
    found = verdict(job_of("finished", finished(**{f"parity__onnx__{case}__passed": passed})))
    assert found.kind is Kind.NOT_PROVEN


@pytest.mark.parametrize("parity", [{"x": 1}, {"passed": True}, {"passed": True, "limits": {}}])
def test_a_proof_without_limits_does_not_ship(parity: dict[str, Any]) -> None:
    found = verdict(job_of("finished", finished(parity={"onnx": {"first": parity}})))
    assert found.kind is Kind.NOT_PROVEN


@pytest.mark.parametrize("case", ["none", "first+second"])
def test_a_use_case_that_fails_or_was_not_checked_counts(case: str) -> None:
    good = finished()["parity"]["onnx"]["first"]
    job = job_of("finished", finished(parity={"qairt": {"first": good, case: good}}))
    recipe = {**job.recipe, "export": {"targets": ["qairt"]}}
    assert verdict(Job(job.results, recipe, "", "job")).kind is Kind.SHIP
    for changes, kind in (
        ({"worst_layer_steps": 9.0, "passed": False}, Kind.DO_NOT_SHIP),
        ({"worst_layer_steps": None}, Kind.NOT_PROVEN),
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


WEIGHTS = {
    "max_abs_logit_difference": 1e-5,
    "base_max_abs_logit_difference": 1e-5,
    "largest_logit": 10.0,
    "top1_agreement": 1.0,
    "off_is_equal": True,
    "perplexity": 56.09,
    "reference_perplexity": 56.09,
    "sequences": 8,
    "tokens": 4096,
    "passed": True,
    "problems": [],
    "limits": {
        "perplexity_difference": 0.003,
        "logit_difference": 1e-3,
        "top1_agreement": 0.999,
    },
}


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({}, Kind.SHIP, "computes what you trained"),
        ({"max_abs_logit_difference": 0.1, "passed": False}, Kind.DO_NOT_SHIP, "off by 0.100"),
        ({"top1_agreement": 0.9, "passed": False}, Kind.DO_NOT_SHIP, "90.00% of tokens"),
        ({"off_is_equal": False, "passed": False}, Kind.DO_NOT_SHIP, "does not give the base"),
        ({"perplexity": 60.0, "passed": False}, Kind.DO_NOT_SHIP, "6.97% away"),
    ],
)
def test_files_without_activations_have_their_own_limits(
    changes: dict[str, Any], kind: Kind, words: str
) -> None:
    job = job_of("finished", finished(parity={"hf": {"first": {**WEIGHTS, **changes}}}))
    job = Job(job.results, {**job.recipe, "export": {"targets": ["hf"]}}, "", "job")
    found = verdict(job)
    assert found.kind is kind
    assert words in found.sentence
    assert "transformers" in render(job)


def test_files_that_were_written_but_not_run_are_not_proven() -> None:
    job = job_of("finished", finished(parity={"mlx": {"first": {"not_run": "mlx is missing"}}}))
    job = Job(job.results, {**job.recipe, "export": {"targets": ["mlx"]}}, "", "job")
    found = verdict(job)
    assert found.kind is Kind.NOT_PROVEN
    assert "was not checked in MLX" in found.sentence
    assert "mlx is missing" in render(job)


@pytest.mark.parametrize(("limit", "outcome"), [(0.023, Outcome.PASSED), (0.003, Outcome.FAILED)])
def test_the_limit_of_a_perplexity_contains_the_noise_floor(limit: float, outcome: Outcome) -> None:
    results = finished(
        **{
            f"{PARITY}perplexity": 54.6,
            f"{PARITY}floor_perplexity_difference": 0.02,
            f"{PARITY}limits__perplexity_difference": limit,
        }
    )
    job = job_of("finished", results)
    check = verdict(job).checks[0]
    assert check.outcome is outcome
    assert check.limit == f"limit {100 * limit:.2f}%, with the noise floor"
    assert f"of {100 * limit:.2f}%" in render(job)


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
    results["parity"]["onnx"]["digits"] |= {"passed": False, "worst_layer_steps": 7.0}
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
    results["parity"]["onnx"]["first"] |= {"worst_layer_steps": 0.0, "perplexity": 99.0}
    job = job_of("failed", results)
    assert "1 sequences are few" in str(remedies(job)[0])
    assert remedy_command(job).endswith("--set verify.sequences=8")
