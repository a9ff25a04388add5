"""The checks behind the verdict: limits of the proof, gain of each adapter, cautions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from markupsafe import Markup

from qwlora.report.job import (
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
BASE = "base"  # instead of an adapter's name
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
        yield from _proof_without_adapter(job, target)
    for adapter in job.adapters:
        yield from _gain_check(job, adapter)
    yield from _identical(job)
    for target in job.targets:
        yield from _few_tokens(job, target)


def proof_checks(job: Job, target: str, adapter: str) -> Iterator[Check]:
    """The limits of one exported file."""
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
    found = [*_limits(job, target, adapter, where, place), *_weights_limits(job, where, place)]
    yield from found
    if parity.get("passed") is False and not any(c.outcome is Outcome.FAILED for c in found):
        problems = "; ".join(str(problem) for problem in parity.get("problems", []))
        yield Check(Outcome.FAILED, f"{where}{problems or 'The check'}", "failed", against=problems)


def _limits(job: Job, target: str, adapter: str, where: str, place: Path) -> Iterator[Check]:
    drift, model = job.drift(target, adapter), _MODELS[job.compared_with(target, adapter)]
    limit = job.limit(target, adapter, "perplexity_difference")
    has_floor = job.number(*place, "floor_perplexity_difference") is not None
    if drift is not None and limit is not None:
        yield Check(
            _within(abs(drift) <= limit),
            f"{where}Perplexity of the exported file against the {model}",
            valued(precise_percent(abs(drift)), drift),
            f"limit {precise_percent(limit)}{', with the noise floor' if has_floor else ''}",
            f"its perplexity is {precise_percent(abs(drift))} away, and the limit is "
            f"{precise_percent(limit)}",
        )
    layers = job.number(*place, "layers")
    for key, name, what, digits in (
        ("worst_layer_steps", "layer_steps", "Worst", 2),
        ("worst_layer_mean_steps", "layer_mean_steps", "Largest mean difference", 4),
    ):
        steps, most = job.number(*place, key), job.limit(target, adapter, name)
        if steps is not None and most is not None:
            yield Check(
                _within(steps <= most),
                f"{where}{what} of {count(layers or 0)} layers, in steps of its grid",
                tagged(fixed(steps, digits), steps, (*place, key)),
                f"limit {most:g}",
                f"one layer is {fixed(steps, digits)} steps off, and the limit is {most:g}",
            )
    sqnr, least = (job.number(*place, "cache", key) for key in ("sqnr", "least_sqnr"))
    if sqnr is not None and least is not None:
        tokens = job.number(*place, "cache", "tokens") or 0
        yield Check(
            _within(sqnr >= least),
            f"{where}Logits of {count(tokens)} tokens, one by one with the key-value cache",
            tagged(f"{fixed(sqnr, 1)} dB", sqnr, (*place, "cache", "sqnr")),
            f"limit {fixed(least, 1)} dB",
            f"with the key-value cache its logits are {fixed(sqnr, 1)} dB from the simulation, and "
            f"the limit is {fixed(least, 1)} dB",
        )
    floor = job.number(*place, "floor_top1_agreement")
    what = f"{where}Same likeliest token, against the noise floor"
    yield from _agreement(job, place, floor, what, "floor", "below the noise floor of")


def _weights_limits(job: Job, where: str, place: Path) -> Iterator[Check]:
    """Limits of files without activations, which are compared with the trained model."""
    for key, what in (
        ("max_abs_logit_difference", "Largest difference of a logit"),
        ("base_max_abs_logit_difference", "The same without the adapter"),
    ):
        value, most = job.number(*place, key), job.number(*place, "limits", "logit_difference")
        if value is not None and most is not None:
            yield Check(
                _within(value <= most),
                f"{where}{what}",
                tagged(significant(value), value, (*place, key)),
                f"limit {significant(most)}",
                f"a logit is off by {significant(value)}, and the limit is {significant(most)}",
            )
    least = job.number(*place, "limits", "top1_agreement")
    what = f"{where}Same likeliest token"
    yield from _agreement(job, place, least, what, "limit", "and the limit is")
    if isinstance(is_equal := job.get(*place, "off_is_equal"), bool):
        yield Check(
            _within(is_equal),
            f"{where}Switching the adapter off gives the base again, bit for bit",
            "yes" if is_equal else "no",
            against="switching the adapter off does not give the base again",
        )


def _agreement(
    job: Job, place: Path, least: float | None, what: str, bound: str, against: str
) -> Iterator[Check]:
    """How often the file's likeliest token is the expected one, if both numbers were measured."""
    share = job.number(*place, "top1_agreement")
    if share is not None and least is not None:
        yield Check(
            _within(share >= least),
            what,
            tagged(precise_percent(share), share, (*place, "top1_agreement")),
            f"{bound} {precise_percent(least)}",
            f"it agrees on {precise_percent(share)} of tokens, {against} {precise_percent(least)}",
        )


def _within(holds: bool) -> Outcome:
    return Outcome.PASSED if holds else Outcome.FAILED


def _summed_proof(job: Job, target: str) -> Iterator[Check]:
    """One line for the proofs of several adapters, and one for each limit that one exceeds."""
    outcomes = {name: list(proof_checks(job, target, name)) for name in job.adapters}
    passed = [name for name, checks in outcomes.items() if _all_passed(checks)]
    failed = [
        (name, check)
        for name, checks in outcomes.items()
        for check in checks
        if check.outcome is Outcome.FAILED
    ]
    total = f"{len(passed)} of {len(outcomes)}"
    outcome = (
        Outcome.FAILED
        if failed
        else Outcome.PASSED
        if len(passed) == len(outcomes)
        else Outcome.MISSING
    )
    yield Check(
        outcome,
        f"{runtime(target)} computes what was trained: {listed(passed) or 'no adapter yet'}",
        total,
        "passed",
        f"{listed(sorted({name for name, _ in failed}))} did not pass",
    )
    for name, check in failed:
        against = f"in {name}, {check.against}"
        yield Check(check.outcome, f"{name}: {check.what}", check.value, check.limit, against)


def _proof_without_adapter(job: Job, target: str) -> Iterator[Check]:
    """One line for the proof of the base in a session that can switch adapters, and one for each
    limit that it exceeds."""
    if BASE not in job.section("parity", target):
        return
    checks = list(proof_checks(job, target, BASE))
    failed = [check for check in checks if check.outcome is Outcome.FAILED]
    passed = _all_passed(checks)
    yield Check(
        Outcome.FAILED if failed else Outcome.PASSED if passed else Outcome.MISSING,
        f"{runtime(target)} computes the base without an adapter",
        "yes" if passed else "no" if failed else NOT_MEASURED,
        against="the files do not compute the base without an adapter",
    )
    for check in failed:
        against = f"without an adapter, {check.against}"
        yield Check(
            check.outcome, f"Without an adapter: {check.what}", check.value, check.limit, against
        )


def _all_passed(checks: list[Check]) -> bool:
    return bool(checks) and all(check.outcome is Outcome.PASSED for check in checks)


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
