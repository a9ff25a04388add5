"""The checks behind the verdict: limits of the proof, gain of each adapter, cautions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from markupsafe import Markup

from qwlora.export.proof.checks import Check as Row
from qwlora.report.number_format import count, listed, percent, precise_percent
from qwlora.report.results_view import (
    BASE,
    FEW_TOKENS,
    NOT_MEASURED,
    ItemPath,
    Job,
    finite,
    runtime,
    tagged,
    valued,
)

NO_ADAPTER = "none"  # the use case of the base, in targets of use cases
LEAST_GAIN = 0.01  # an adapter should beat the float model by this much


class Outcome(Enum):
    """What a check found: the word for it, and the class of its color."""

    PASSED = ("Passed", "o")
    CAUTION = ("Caution", "w")
    FAILED = ("Failed", "b")
    MISSING = ("Not measured", "u")

    @property
    def word(self) -> str:
        return self.value[0]

    @property
    def color(self) -> str:
        return self.value[1]


@dataclass(frozen=True)
class Check:
    """One line under the verdict.

    Args:
        what: what was checked.
        value: what was found; with `limit`, in words.
        against: the fact as the end of the verdict's sentence, if it speaks against shipping.
    """

    outcome: Outcome
    what: str | Markup
    value: str | Markup
    limit: str = ""
    against: str = ""


def all_checks(job: Job) -> Iterator[Check]:
    """Every check of a job, those of the proof first."""
    for target in job.targets:
        if len(job.adapters) == 1:
            yield from proof_checks(job, target, job.adapters[0])
        else:
            yield from _summed_proof(job, target)
        for case in job.other_cases(target):
            yield from _proof_of_case(job, target, case)
    for adapter in job.adapters:
        yield from _gain_check(job, adapter)
    yield from _identical(job)
    for target in job.targets:
        yield from _few_tokens(job, target)


def proof_checks(job: Job, target: str, adapter: str) -> Iterator[Check]:
    """The rows of the proof of one exported file. One without a number is not measured."""
    where = "" if len(job.targets) == 1 else f"{runtime(target)}: "
    reason, parity = job.stale.get((target, adapter)), job.parity(target, adapter)
    rows = job.proof_rows(target, adapter)
    if reason is not None:
        what = f"Files of {adapter} changed after the check: {reason}"
        yield Check(Outcome.MISSING, where + what, NOT_MEASURED)
    elif not parity or (parity.get("passed") is True and not rows):
        why = job.get("parity", target, adapter, "not_run")
        what = f"Exported file against what was trained{f': {why}' if why else ''}"
        yield Check(Outcome.MISSING, where + what, NOT_MEASURED)
    else:
        place = ("parity", target, adapter, "checks")
        checks = [_of_row(row, where, (*place, n, "value")) for n, row in enumerate(rows)]
        yield from checks
        yield from _rest(parity, where, checks)


def _of_row(row: Row, where: str, path: ItemPath) -> Check:
    """A row of a proof, which is judged already. Without a number it says nothing."""
    what = f"{where}{row.what[:1].upper()}{row.what[1:]}"
    if row.passed and not row.is_measured:
        return Check(Outcome.MISSING, what, NOT_MEASURED)
    number, value = finite(row.value), row.shown_value
    return Check(
        Outcome.PASSED if row.passed else Outcome.FAILED,
        what,
        value if number is None else tagged(value, number, path),
        row.shown_limit,
        row.sentence,
    )


def _rest(parity: Mapping[str, Any], where: str, checks: list[Check]) -> Iterator[Check]:
    """The verdict of the proof itself, where its rows do not say it."""
    if parity.get("passed") is False and not any(c.outcome is Outcome.FAILED for c in checks):
        problems = "; ".join(str(problem) for problem in parity.get("problems", []))
        yield Check(Outcome.FAILED, f"{where}{problems or 'The check'}", "failed", against=problems)
    elif not isinstance(parity.get("passed"), bool):
        yield Check(Outcome.MISSING, f"{where}The check of the exported file", NOT_MEASURED)


def _summed_proof(job: Job, target: str) -> Iterator[Check]:
    """One line for the proofs of several adapters, and one for each limit that one exceeds."""
    outcomes = {name: list(proof_checks(job, target, name)) for name in job.adapters}
    passed = [name for name, checks in outcomes.items() if outcome_of(checks) is Outcome.PASSED]
    failed = [name for name, checks in outcomes.items() if outcome_of(checks) is Outcome.FAILED]
    yield Check(
        outcome_of([check for checks in outcomes.values() for check in checks]),
        f"{runtime(target)} computes what was trained: {listed(passed) or 'no adapter yet'}",
        f"{len(passed)} of {len(outcomes)}",
        "passed",
        f"{listed(sorted(failed))} did not pass",
    )
    for name in failed:
        yield from _failed(outcomes[name], name)


def _proof_of_case(job: Job, target: str, case: str) -> Iterator[Check]:
    """One line for the base in a session that can switch adapters, or a use case of several
    adapters, and one for each limit that it exceeds."""
    checks = list(proof_checks(job, target, case))
    outcome = outcome_of(checks)
    is_base = case in (BASE, NO_ADAPTER)
    what = "the base without an adapter" if is_base else f"{case} together"
    yield Check(
        outcome,
        f"{runtime(target)} computes {what}",
        {Outcome.PASSED: "yes", Outcome.FAILED: "no"}.get(outcome, NOT_MEASURED),
        against=f"the files do not compute {what}",
    )
    yield from _failed(checks, "without an adapter" if is_base else case)


def _failed(checks: list[Check], where: str) -> Iterator[Check]:
    """The failed ones of `checks`, with where they were made."""
    for check in checks:
        if check.outcome is Outcome.FAILED:
            yield replace(check, what=f"{where}: {check.what}", against=f"{where}: {check.against}")


def outcome_of(checks: Collection[Check]) -> Outcome:
    """The worst outcome; nothing checked is not measured."""
    outcomes = {check.outcome for check in checks} or {Outcome.MISSING}
    order = (Outcome.FAILED, Outcome.MISSING, Outcome.CAUTION, Outcome.PASSED)
    return next(outcome for outcome in order if outcome in outcomes)


def _gain_check(job: Job, adapter: str) -> Iterator[Check]:
    """Whether the adapter beats the float model on held-out text."""
    who = "Adapter" if len(job.adapters) == 1 else adapter
    kind = job.best_kind(adapter)
    if kind is None:
        return
    name = (
        f"Simulated {who[0].lower()}{who[1:]}" if kind == "simulated" and who == "Adapter" else who
    )
    change = job.change(kind, "float", adapter)
    if change is None:
        yield from _gain_over_base(job, adapter, kind, name)
        return
    stderr = job.number("perplexity_ratio", kind, adapter, "stderr")
    least = LEAST_GAIN if stderr is None else 2 * stderr
    needed = "1%" if stderr is None else f"2 standard errors ({precise_percent(2 * stderr)})"
    is_better = change < 0 and -change >= least
    yield Check(
        Outcome.PASSED if is_better else Outcome.CAUTION,
        f"{name} against the float model, held-out text",
        valued(percent(change, sign=True), change),
        "perplexity" if is_better else f"better by {needed} expected",
        f"{'the adapter' if who == 'Adapter' else adapter} is "
        + (
            f"{percent(change)} worse than the float model on held-out text"
            if change > 0
            else f"not clearly better than the float model on held-out text ({percent(change)})"
        ),
    )


def _gain_over_base(job: Job, adapter: str, kind: str, name: str) -> Iterator[Check]:
    """Without a float model, the adapter can only be compared with the packed base."""
    change = job.change(kind, "base", adapter)
    if change is None:
        yield Check(Outcome.MISSING, f"{name} against the float model", NOT_MEASURED)
        return
    yield Check(
        Outcome.PASSED if change < 0 else Outcome.CAUTION,
        f"{name} against the packed base, held-out text (there is no float model)",
        valued(percent(change, sign=True), change),
        "perplexity",
        "the adapter is no better than the packed base on held-out text",
    )


def identical_adapters(job: Job) -> list[list[str]]:
    """Groups of adapters with the same loss in every training step."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name in job.adapters:
        losses = job.get("train", name, "losses")
        if isinstance(losses, list) and losses:
            groups.setdefault(tuple(losses), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _identical(job: Job) -> Iterator[Check]:
    for names in identical_adapters(job):
        yield Check(
            Outcome.CAUTION,
            f"{listed(names)} have the same loss in every step: same data, settings and seed",
            f"{len(names)} of {len(job.adapters)}",
            against=f"{listed(names)} are identical",
        )


def _few_tokens(job: Job, target: str) -> Iterator[Check]:
    tokens = {name: job.number("parity", target, name, "tokens") for name in job.adapters}
    known = {name: number for name, number in tokens.items() if number is not None}
    if known and min(known.values()) < FEW_TOKENS:
        name = min(known, key=lambda n: known[n])
        is_counted = job.number("parity", target, name, "sequences") is not None
        more = "; raise verify.sequences" if is_counted else ""
        yield Check(
            Outcome.CAUTION,
            f"Tokens on which {runtime(target)} was checked{more}",
            tagged(count(known[name]), known[name], ("parity", target, name, "tokens")),
            f"{count(FEW_TOKENS)} or more expected",
            f"{'it was' if len(known) == 1 else 'they were'} checked on "
            f"{count(known[name])} tokens only",
        )
