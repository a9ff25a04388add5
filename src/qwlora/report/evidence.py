"""What speaks for and against shipping: the proofs of exported files, the gain of each adapter,
and cautions.

A check of a proof was judged by `export/proof`; here it becomes a line of the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from markupsafe import Markup

from qwlora.report.number_format import (
    NOT_MEASURED,
    count,
    finite,
    listed,
    percent,
    precise_percent,
    tagged,
    valued,
)
from qwlora.report.results_view import BASE, Job, capitalized, runtime

NO_ADAPTER = "none"  # the use case of the base, in targets of use cases
LEAST_GAIN = 0.01  # an adapter should beat the float model by this much
FEW_TOKENS = 1000  # a proof on fewer tokens is a caution


class Outcome(Enum):
    """The outcome of a check, worst first: its word, and the class of its color."""

    FAILED = ("Failed", "b")
    MISSING = ("Not measured", "u")
    CAUTION = ("Caution", "w")
    PASSED = ("Passed", "o")

    def __init__(self, word: str, color: str):
        self.word, self.color = word, color


@dataclass(frozen=True)
class Evidence:
    """One line under the verdict.

    Args:
        what: what was checked.
        value: the result; with `limit`, in words.
        against: the fact as the end of the verdict's sentence, if it speaks against shipping.
    """

    outcome: Outcome
    what: str | Markup
    value: str | Markup
    limit: str = ""
    against: str = ""


def all_evidence(job: Job) -> Iterator[Evidence]:
    """All evidence of a job, that of the proofs first."""
    for target in job.targets:
        yield from _of_target(job, target)
    for adapter in job.adapters:
        yield from _gain(job, adapter)
    for names in identical_adapters(job):
        yield Evidence(
            Outcome.CAUTION,
            f"{listed(names)} have the same loss in every step: same data, settings and seed",
            f"{len(names)} of {len(job.adapters)}",
            against=f"{listed(names)} are identical",
        )
    for target in job.targets:
        yield from _few_tokens(job, target)


def outcome_of(evidence: Iterable[Evidence]) -> Outcome:
    """The worst outcome; nothing checked is not measured."""
    outcomes = {item.outcome for item in evidence} or {Outcome.MISSING}
    return next(outcome for outcome in Outcome if outcome in outcomes)


def proof_evidence(job: Job, target: str, case: str) -> list[Evidence]:
    """The checks of the proof of one exported file."""
    where = "" if len(job.targets) == 1 else f"{runtime(target)}: "
    if (reason := job.stale.get((target, case))) is not None:
        what = f"{where}Files of {case} changed after the check: {reason}"
        return [Evidence(Outcome.MISSING, what, NOT_MEASURED)]
    evidence = []
    for number, row in enumerate(job.proof_rows(target, case)):
        what, value = f"{where}{capitalized(row.what)}", row.shown_value
        if row.passed and not row.is_measured:  # without a number it says nothing
            evidence.append(Evidence(Outcome.MISSING, what, NOT_MEASURED))
            continue
        if (exact := finite(row.value)) is not None:
            value = tagged(value, exact, ("parity", target, case, "checks", number, "value"))
        outcome = Outcome.PASSED if row.passed else Outcome.FAILED
        evidence.append(Evidence(outcome, what, value, row.shown_limit, row.sentence))
    parity = job.parity(target, case)
    if parity.get("passed") is False and outcome_of(evidence) is not Outcome.FAILED:
        problems = "; ".join(str(problem) for problem in parity.get("problems", []))
        what = f"{where}{problems or 'The check'}"
        evidence.append(Evidence(Outcome.FAILED, what, "failed", against=problems))
    elif not evidence or not isinstance(parity.get("passed"), bool):
        why = job.get("parity", target, case, "not_run")
        what = f"{where}Exported file against what was trained{f': {why}' if why else ''}"
        evidence.append(Evidence(Outcome.MISSING, what, NOT_MEASURED))
    return evidence


def _of_target(job: Job, target: str) -> Iterator[Evidence]:
    """All checks for a single adapter. For several, one line for their proofs. For the base and
    for several adapters together, one line each. Every check that failed has its own."""
    proofs = {name: proof_evidence(job, target, name) for name in job.adapters}
    outcomes = {name: outcome_of(evidence) for name, evidence in proofs.items()}
    if len(proofs) == 1:
        yield from proofs[job.adapters[0]]
    else:
        passed, failed = (
            [name for name in proofs if outcomes[name] is outcome]
            for outcome in (Outcome.PASSED, Outcome.FAILED)
        )
        yield Evidence(
            outcome_of(item for evidence in proofs.values() for item in evidence),
            f"{runtime(target)} computes what was trained: {listed(passed) or 'no adapter yet'}",
            f"{len(passed)} of {len(proofs)}",
            "passed",
            f"{listed(sorted(failed))} did not pass",
        )
        for name in failed:
            yield from _failed(proofs[name], name)
    for case in job.other_cases(target):
        is_base = case in (BASE, NO_ADAPTER)
        what = "the base without an adapter" if is_base else f"{case} together"
        evidence = proof_evidence(job, target, case)
        outcome = outcome_of(evidence)
        yield Evidence(
            outcome,
            f"{runtime(target)} computes {what}",
            {Outcome.PASSED: "yes", Outcome.FAILED: "no"}.get(outcome, NOT_MEASURED),
            against=f"the files do not compute {what}",
        )
        yield from _failed(evidence, "without an adapter" if is_base else case)


def _failed(evidence: list[Evidence], where: str) -> Iterator[Evidence]:
    for item in evidence:
        if item.outcome is Outcome.FAILED:
            what, against = f"{where}: {item.what}", f"{where}: {item.against}"
            yield replace(item, what=what, against=against)


def _gain(job: Job, adapter: str) -> Iterator[Evidence]:
    """Whether the adapter beats the float model on held-out text; where there is no float model,
    the packed base."""
    kind = job.final_kind(adapter)
    if kind is None:
        return
    is_only = len(job.adapters) == 1
    name = ("Simulated adapter" if kind == "simulated" else "Adapter") if is_only else adapter
    change, over_base = job.change(kind, "float", adapter), job.change(kind, "base", adapter)
    if change is None and over_base is None:
        yield Evidence(Outcome.MISSING, f"{name} against the float model", NOT_MEASURED)
    if change is None and over_base is not None:
        yield Evidence(
            Outcome.PASSED if over_base < 0 else Outcome.CAUTION,
            f"{name} against the packed base, held-out text (there is no float model)",
            valued(percent(over_base, sign=True), over_base),
            "perplexity",
            "the adapter is no better than the packed base on held-out text",
        )
    if change is not None:
        stderr = job.number("perplexity_ratio", kind, adapter, "stderr")
        least = LEAST_GAIN if stderr is None else 2 * stderr
        needed = (
            f"{LEAST_GAIN:.0%}"
            if stderr is None
            else f"2 standard errors ({precise_percent(least)})"
        )
        is_better = change < 0 and -change >= least
        worse = f"{percent(change)} worse than the float model on held-out text"
        unclear = f"not clearly better than the float model on held-out text ({percent(change)})"
        yield Evidence(
            Outcome.PASSED if is_better else Outcome.CAUTION,
            f"{name} against the float model, held-out text",
            valued(percent(change, sign=True), change),
            "perplexity" if is_better else f"better by {needed} expected",
            f"{'the adapter' if is_only else adapter} is {worse if change > 0 else unclear}",
        )


def identical_adapters(job: Job) -> list[list[str]]:
    """Groups of adapters with the same loss in every training step."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name in job.adapters:
        losses = job.get("train", name, "losses")
        if isinstance(losses, list) and losses:
            groups.setdefault(tuple(losses), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _few_tokens(job: Job, target: str) -> Iterator[Evidence]:
    numbers = {name: job.number("parity", target, name, "tokens") for name in job.adapters}
    known = {name: number for name, number in numbers.items() if number is not None}
    name = min(known, key=lambda n: known[n], default="")
    if not known or known[name] >= FEW_TOKENS:
        return
    has_setting = job.number("parity", target, name, "sequences") is not None
    more = "; raise verify.sequences" if has_setting else ""
    yield Evidence(
        Outcome.CAUTION,
        f"Tokens on which {runtime(target)} was checked{more}",
        tagged(count(known[name]), known[name], ("parity", target, name, "tokens")),
        f"{count(FEW_TOKENS)} or more expected",
        f"{'it was' if len(known) == 1 else 'they were'} checked on "
        f"{count(known[name])} tokens only",
    )
