"""The verdict of the report: its rules, in their order, on both sides of every limit."""

from typing import Any

import pytest

from qwlora.report.number_format import MINUS
from qwlora.report.verdict import FEW_TOKENS, Outcome, Verdict, VerdictKind, verdict
from report.recorded import check_of, failing, job_of, results_of, running

SHIP, WITH_CARE, NOT_PROVEN = VerdictKind.SHIP, VerdictKind.WITH_CARE, VerdictKind.NOT_PROVEN
DO_NOT_SHIP, NONE_YET = VerdictKind.DO_NOT_SHIP, VerdictKind.NONE_YET
PERPLEXITY, TOKENS = "difference of perplexity", "tokens with the same likeliest"
LAYER, MEAN = "difference of layer", "largest mean difference"


def changed(results: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Results with changes by dotted key."""
    for key, value in changes.items():
        *path, last = key.split("__")
        holder = results
        for name in path:
            holder = holder.setdefault(name, {})
        holder[last] = value
    return results


def finished(**changes: Any) -> dict[str, Any]:
    """Results of a job whose checks all pass, with changes by dotted key."""
    return changed(results_of("finished"), {"parity__onnx__first__tokens": 4096, **changes})


def judged(**changes: Any) -> Verdict:
    return verdict(job_of("finished", finished(**changes)))


def two_results() -> dict[str, Any]:
    """Results of a job of two adapters, `words` and `digits`, whose checks all pass."""
    enough = {f"parity__onnx__{name}__tokens": 9 * FEW_TOKENS for name in ("words", "digits")}
    return changed(results_of("two"), enough)


def gain(reference: str, before: float, after: float, **ratio: float) -> dict[str, Any]:
    """Changes after which an adapter's only comparison is with `reference`."""
    return {
        "perplexity": {reference: before, "simulated": {"first": after}},
        "perplexity_ratio": {"simulated": {"first": ratio}} if ratio else {},
    }


def over_float_lora(over: float, reference: float = 100.0) -> dict[str, Any]:
    """Changes of a job with `reference: float` whose float model has a perplexity of 120."""
    perplexity = {"float": 120.0, "reference": {"first": reference}}
    return {"perplexity": {**perplexity, "simulated": {"first": reference * (1 + over)}}}


PARITY = "parity__onnx__first__"
OTHER_PROBLEM = {f"{PARITY}checks": [{"what": "the file is <odd>", "value": True}]}
STOPPED = {"run__state": "interrupted", "run__stage": "train/first"}
CRASHED = {"run__state": "failed", "error__stage": "export/onnx/first", "parity": {}}
GAINS = [
    (gain("float", 100.0, 98.9), SHIP, "beats the float model by 1.1%"),
    (gain("float", 100.0, 99.1), WITH_CARE, "not clearly better"),
    (gain("float", 128.0, 112.0, stderr=0.0625), SHIP, "by 12.5%"),  # by exactly 2 of them
    (gain("float", 128.0, 112.0, stderr=0.0626), WITH_CARE, "not clearly better"),
    (gain("float", 128.0, 128.0, stderr=0.0), WITH_CARE, "not clearly better"),
    (gain("base", 100.0, 99.9), SHIP, "computes what you trained"),
    (gain("base", 100.0, 100.0), WITH_CARE, "not clearly better than the packed base"),
    (gain("base", 100.0, 120.0), WITH_CARE, "20.0% worse than the packed base"),
    (over_float_lora(0.011), SHIP, "what you trained, 1.1% over float LoRA on held-out text"),
    (over_float_lora(0.049), SHIP, "4.9% over float LoRA"),
    (over_float_lora(0.051), WITH_CARE, "trained, but the adapter is 5.1% over float LoRA"),
    (over_float_lora(0.0, 119.5), WITH_CARE, "float LoRA is not clearly better than the float"),
]


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        *GAINS,
        ({}, SHIP, "beats the float model by 86.7%"),
        ({"run__state": "running"}, NONE_YET, "is running"),
        ({"run__state": "running", f"{PARITY}passed": False}, NONE_YET, "is running"),
        ({"run__state": "incomplete"}, NONE_YET, "not complete"),
        (STOPPED, NONE_YET, "interrupted in stage train/first"),
        (OTHER_PROBLEM, DO_NOT_SHIP, "the file is <odd>"),
        (CRASHED, DO_NOT_SHIP, "stopped in stage export/onnx/first"),
        ({"parity": {}}, NOT_PROVEN, "was not checked in ONNX Runtime"),
        ({"perplexity__simulated__first": 420.0}, WITH_CARE, f"held-out text ({MINUS}0.25%)"),
        ({"perplexity__simulated__first": 500.0}, WITH_CARE, "the adapter is 18.8% worse than"),
        ({f"{PARITY}tokens": FEW_TOKENS - 1}, WITH_CARE, "checked on 999 tokens only"),
        ({"kl": {}}, SHIP, "but KL divergence and task accuracy were not measured."),
    ],
)
def test_rules_apply_in_order(changes: dict[str, Any], kind: VerdictKind, words: str) -> None:
    found = judged(**changes)
    assert found.kind is kind
    assert words in found.sentence
    assert found.sentence.endswith(".")
    assert kind.label not in found.sentence  # it is shown next to it


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
def test_a_failed_row_is_the_sentence_of_the_verdict(what: str, value: Any, shown: str) -> None:
    for case, said in (("first", shown), ("base", "do not compute the base without an adapter")):
        found = verdict(job_of("finished", failing(finished(), what, value, case)))
        assert found.kind is DO_NOT_SHIP
        assert said in found.sentence


def test_a_row_that_does_not_say_that_it_passed_does_not_ship() -> None:
    results = finished()
    for passed in (None, "true", 1, False):
        check_of(results, LAYER)["passed"] = passed
        assert verdict(job_of("finished", results)).kind is DO_NOT_SHIP


def test_files_that_changed_after_the_check_are_not_proven() -> None:
    found = verdict(job_of("finished", finished(), stale={("onnx", "first"): "it has changed"}))
    assert found.kind is NOT_PROVEN
    assert "changed after the check" in found.sentence
    assert not any(c.outcome is Outcome.PASSED and "step" in str(c.what) for c in found.evidence)


BOTH = finished()["parity"]["onnx"]
PROOF = BOTH["first"]
SHIPPED = {**PROOF, "of": "trained", "shipped_perplexity": 54.67, "shipped_top1_agreement": 0.9629}
OWN = "as shipped, with 8-bit activations: 96.29% top-1 agreement"
NOT_RUN, NO_CHECKS = {"not_run": "no program"}, {"passed": True, "checks": []}


@pytest.mark.parametrize(
    ("parity", "kind", "words"),
    [
        ({"hf": {"first": {**PROOF, "of": "trained"}}}, SHIP, "computes what you trained"),
        ({"gguf": {"first": SHIPPED}}, SHIP, f"what you trained (in float32; {OWN}) and beats"),
        ({"gguf": {"first": {**SHIPPED, **NOT_RUN}}}, NOT_PROVEN, "by 86.7% on held-out text, but"),
        ({"gguf": {"first": SHIPPED}, "hf": BOTH}, SHIP, f"trained (llama.cpp in float32; {OWN}),"),
        ({"mlx": {"first": NOT_RUN}}, NOT_PROVEN, "was not checked in MLX"),
        ({}, NOT_PROVEN, "no export target"),
        ({"onnx": BOTH, "hf": BOTH}, SHIP, "Both exported files compute what you trained, and"),
        ({"onnx": BOTH, "hf": {}}, NOT_PROVEN, ""),
        ({"onnx": {"first": {"x": 1}}}, NOT_PROVEN, ""),
        ({"onnx": {"first": {"passed": True}}}, NOT_PROVEN, ""),
        ({"onnx": {"first": NO_CHECKS}}, NOT_PROVEN, ""),
        ({"onnx": {"first": {"checks": [1]}}}, NOT_PROVEN, ""),
        ({"qairt": {"first": PROOF, "none": PROOF}}, SHIP, ""),
        ({"qairt": {"first": PROOF, "none": {**PROOF, **NOT_RUN}}}, NOT_PROVEN, ""),
        ({"qairt": {"first": PROOF, "none": {**PROOF, "checks": []}}}, NOT_PROVEN, ""),
        ({"qairt": {"first": PROOF, "first+second": {**PROOF, **NOT_RUN}}}, NOT_PROVEN, ""),
    ],
)
def test_every_target_and_use_case_needs_a_proof(parity, kind, words) -> None:
    found = verdict(job_of("finished", finished(parity=parity), targets=parity))
    assert found.kind is kind
    assert words in found.sentence


def test_what_was_not_measured_never_counts_as_passed() -> None:
    measured = finished(kl={"base": {"mean": 0.1}}, tasks={"float": {"arc": {"value": 0.5}}})
    assert "not measured" not in verdict(job_of("finished", measured)).sentence
    for changes in ({"parity": {}}, {"perplexity": {"simulated": {"first": 9.0}}}):
        outcomes = {str(f.what): f.outcome for f in judged(**changes).evidence}
        assert Outcome.MISSING in outcomes.values()
    assert outcomes["Simulated adapter against the float model"] is Outcome.MISSING


WRONG = [{"what": "it", "value": 2.0, "limit": 1.0}]


@pytest.mark.parametrize("name", ["words", "digits"])
@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"parity__onnx__NAME": {}}, NOT_PROVEN, "NAME"),
        ({"parity__onnx__NAME": {"not_run": "it is missing"}}, NOT_PROVEN, "NAME"),
        ({"parity__onnx__NAME": {"checks": WRONG}}, DO_NOT_SHIP, "NAME"),
        ({"stale": "NAME"}, NOT_PROVEN, "NAME"),
        ({"parity__onnx__NAME__tokens": FEW_TOKENS}, SHIP, ""),
        ({"parity__onnx__NAME__tokens": None}, SHIP, ""),
        ({"parity__onnx__NAME__tokens": FEW_TOKENS - 1}, WITH_CARE, f"{FEW_TOKENS - 1} tokens"),
        ({"perplexity__on__NAME": {"base": 329.0, "float": 300.0}}, SHIP, ""),
        ({"perplexity__on__NAME": {"base": 333.0, "float": 300.0}}, WITH_CARE, "11.0%"),
    ],
)
def test_every_adapter_counts(name, changes, kind, words) -> None:
    given = {key.replace("NAME", name): value for key, value in changes.items()}
    stale = {("onnx", name): "it has changed"} if given.pop("stale", None) else {}
    found = verdict(job_of("two", changed(two_results(), given), stale=stale))
    assert found.kind is kind
    assert words.replace("NAME", name) in found.sentence
    if kind is DO_NOT_SHIP:
        assert any("1 of 2" in str(item.value) for item in found.evidence)


def test_of_several_adapters_the_least_agreement_as_shipped_is_claimed() -> None:
    onnx = two_results()["parity"]["onnx"]
    shares = {"words": 0.98, "digits": 0.97}
    parity = {n: {**onnx[n], "shipped_top1_agreement": share} for n, share in shares.items()}
    results = changed(two_results(), {"parity": {"gguf": parity}})
    found = verdict(job_of("two", results, targets=["gguf"]))
    assert "at least 97.00% top-1 agreement" in found.sentence
    assert any("at least 97.00%" in str(item.what) for item in found.evidence)


@pytest.mark.parametrize(("least", "best"), [("words", "digits"), ("digits", "words")])
@pytest.mark.parametrize(
    ("perplexity", "kind", "said"),
    [
        (90.0, SHIP, "every adapter beats the float model by 10.0% or more"),
        (110.0, WITH_CARE, "Both exported files compute what you trained, but "),
    ],
)
def test_of_several_adapters_the_smallest_gain_is_claimed(least, best, perplexity, kind, said):
    simulated = {least: perplexity, best: 70.0}
    changes: dict[str, Any] = {"train__words__text": None, "train__digits__text": None}
    changes["perplexity"] = {"float": 100.0, "on": {}, "simulated": simulated}
    changes["perplexity_ratio"] = {}
    found = verdict(job_of("two", changed(two_results(), changes)))
    assert found.kind is kind
    assert said in found.sentence


def test_a_running_job_says_how_far_it_is() -> None:
    found = verdict(running(37))
    assert found.sentence == "Training of first is at step 37 of 60."
    assert found.progress == pytest.approx(37 / 60)
