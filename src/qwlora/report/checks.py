"""The checks behind the verdict: limits of the proof, gain of each adapter, cautions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

from markupsafe import Markup

from qwlora.export.proof.checks import Check as Row
from qwlora.report.job import (
    BASE,
    FEW_TOKENS,
    NOT_MEASURED,
    Job,
    Path,
    runtime,
    tagged,
    valued,
)
from qwlora.report.written_numbers import (
    count,
    fixed,
    listed,
    percent,
    precise_percent,
    significant,
)

_MODELS = {"simulated": "simulation", "adapted": "trained model"}
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
    """The limits of one exported file. What was not measured, or is not finite, never passes."""
    parity = job.parity(target, adapter)
    place = ("parity", target, adapter)
    where = "" if len(job.targets) == 1 else f"{runtime(target)}: "
    if (reason := job.stale.get((target, adapter))) is not None:
        yield Check(
            Outcome.MISSING,
            f"{where}Files of {adapter} changed after the check: {reason}",
            NOT_MEASURED,
        )
        return
    if not parity:
        why = job.get(*place, "not_run")
        what = f"{where}Exported file against what was trained"
        yield Check(Outcome.MISSING, f"{what}: {why}" if why else what, NOT_MEASURED)
        return
    if rows := [Row(**fields) for fields in parity.get("checks") or ()]:
        yield from (_of_row(row, where) for row in rows)
        if parity.get("passed") is not True and all(row.passed for row in rows):
            yield Check(Outcome.MISSING, f"{where}The check of the exported file", NOT_MEASURED)
        return
    kept = [limit for limit in LIMITS if job.get(*place, *limit.path) is not None]
    checks = [_check(limit, job, place, where) for limit in kept]
    known = {limit.path[-1] for limit in kept}
    checks += [
        Check(Outcome.MISSING, f"{where}Limit {name}", NOT_MEASURED)
        for name in job.section(*place, "limits")
        if name not in known
    ]
    if isinstance(is_equal := job.get(*place, "off_is_equal"), bool):
        checks.append(
            Check(
                _within(is_equal),
                f"{where}Switching the adapter off gives the base again, bit for bit",
                "yes" if is_equal else "no",
                against="switching the adapter off does not give the base again",
            )
        )
    yield from checks
    passed = parity.get("passed")
    if passed is False and not any(c.outcome is Outcome.FAILED for c in checks):
        problems = "; ".join(str(problem) for problem in parity.get("problems", []))
        yield Check(Outcome.FAILED, f"{where}{problems or 'The check'}", "failed", against=problems)
    elif passed is not False and not (passed is True and job.section(*place, "limits")):
        yield Check(Outcome.MISSING, f"{where}The check of the exported file", NOT_MEASURED)


def _of_row(row: Row, where: str) -> Check:
    """A row of a proof; it is judged already."""
    value, _, limit = row.sentence.removeprefix(f"{row.what}: ").partition(" (")
    what = where + row.what[0].upper() + row.what[1:]
    return Check(_within(row.passed), what, value, limit.rstrip(")"), row.sentence)


@dataclass(frozen=True)
class Limit:
    """A limit of a proof.

    Args:
        path: of the limit in `parity.TARGET.ADAPTER`.
        value: path of what it bounds; empty for the difference of the perplexity.
        against: the end of the verdict's sentence, with the value and the limit.
        is_least: whether the limit is the smallest value that passes, not the largest.
    """

    path: Path
    value: Path
    what: str
    write: Callable[[float], str]
    against: str
    is_least: bool = False


_LAYER = "one layer is {} steps off, and the limit is {}"
_LOGIT = "a logit is off by {}, and the limit is {}"
_MEANS = "Largest mean difference of {layers} layers, in steps of its grid"
LIMITS = (
    Limit(
        ("limits", "perplexity_difference"),
        (),
        "Perplexity of the exported file against the {model}",
        precise_percent,
        "its perplexity is {} away, and the limit is {}",
    ),
    Limit(
        ("limits", "layer_steps"),
        ("worst_layer_steps",),
        "Worst of {layers} layers, in steps of its grid",
        fixed,
        _LAYER,
    ),
    Limit(("limits", "layer_mean_steps"), ("worst_layer_mean_steps",), _MEANS, significant, _LAYER),
    Limit(
        ("limits", "sqnr"),
        ("sqnr",),
        "Logits, dB against the simulation",
        partial(fixed, digits=1),
        "its logits are {} dB from the simulation, and the limit is {}",
        is_least=True,
    ),
    Limit(
        ("cache", "least_sqnr"),
        ("cache", "sqnr"),
        "Logits of {cached} tokens, one by one with the key-value cache, dB",
        partial(fixed, digits=1),
        "with the key-value cache its logits are {} dB from the simulation, and the limit is {}",
        is_least=True,
    ),
    Limit(
        ("floor_top1_agreement",),
        ("top1_agreement",),
        "Same likeliest token, against the noise floor",
        precise_percent,
        "it agrees on {} of tokens, below the noise floor of {}",
        is_least=True,
    ),
    Limit(
        ("limits", "logit_difference"),
        ("max_abs_logit_difference",),
        "Largest difference of a logit",
        significant,
        _LOGIT,
    ),
    Limit(
        ("limits", "logit_difference"),
        ("base_max_abs_logit_difference",),
        "Largest difference of a logit without the adapter",
        significant,
        _LOGIT,
    ),
    Limit(
        ("limits", "top1_agreement"),
        ("top1_agreement",),
        "Same likeliest token",
        precise_percent,
        "it agrees on {} of tokens, and the limit is {}",
        is_least=True,
    ),
)


def _check(limit: Limit, job: Job, place: Path, where: str) -> Check:
    _, target, adapter = place
    drift = job.drift(target, adapter)
    value = job.number(*place, *limit.value) if limit.value else drift and abs(drift)
    bound = job.number(*place, *limit.path)
    what = where + limit.what.format(
        model=_MODELS[job.compared_with(target, adapter)],
        layers=count(job.number(*place, "layers") or 0),
        cached=count(job.number(*place, "cache", "tokens") or 0),
    )
    if value is None or bound is None:
        return Check(Outcome.MISSING, what, NOT_MEASURED)
    shown, allowed = limit.write(value), limit.write(bound)
    word = "limit" if limit.path != ("floor_top1_agreement",) else "floor"
    has_floor = not limit.value and job.get(*place, "floor_perplexity_difference") is not None
    return Check(
        _within(value >= bound if limit.is_least else value <= bound),
        what,
        tagged(shown, value, (*place, *limit.value)) if limit.value else valued(shown, value),
        f"{word} {allowed}{', with the noise floor' * has_floor}",
        limit.against.format(shown, allowed),
    )


def _within(holds: bool) -> Outcome:
    return Outcome.PASSED if holds else Outcome.FAILED


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
