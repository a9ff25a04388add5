"""The verdict: may these files be shipped? By rule, in this order:

    No verdict yet    the job is not finished
    Do not ship       a check failed, or a stage did
    Not proven        an exported file was not checked, or changed after the check
    Ship with care    all checks passed, with a caution
    Ship              all checks passed

A caution: an adapter is not better than the float model by 1%, or by 2 standard errors where those
were measured; two adapters are identical; a file was checked on fewer than 1,000 tokens. What was
not measured never counts as passed.

The sentence is the strongest fact for, ", but ", the strongest fact against.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from markupsafe import Markup

from qwlora.report.job import (
    FEW_TOKENS,
    NOT_MEASURED,
    Job,
    Path,
    code,
    runtime,
    tagged,
    valued,
    without_folders,
)
from qwlora.report.written_numbers import (
    count,
    fixed,
    listed,
    percent,
    precise_percent,
    seconds,
    significant,
)

_MODELS = {"simulated": "simulation", "adapted": "trained model"}
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


class Kind(Enum):
    """A verdict: its name, and the class of its color."""

    NONE_YET = ("No verdict yet", "run")
    DO_NOT_SHIP = ("Do not ship", "bad")
    NOT_PROVEN = ("Not proven", "unp")
    WITH_CARE = ("Ship with care", "warn")
    SHIP = ("Ship", "ok")

    @property
    def label(self) -> str:
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


@dataclass(frozen=True)
class Verdict:
    """The verdict, its sentence, the line below it, and the checks behind it.

    Args:
        progress: of the stage that runs, from 0 to 1.
    """

    kind: Kind
    sentence: str
    below: str | Markup
    checks: tuple[Check, ...]
    progress: float | None = None


def verdict(job: Job) -> Verdict:
    """Apply the rules to a job."""
    checks = tuple(all_checks(job))
    outcomes = {check.outcome for check in checks}
    if job.state in ("running", "interrupted", "incomplete"):
        return _unfinished(job, checks)
    if job.state == "failed" or Outcome.FAILED in outcomes:
        return Verdict(Kind.DO_NOT_SHIP, _failure(job, checks), _below_failure(job), checks)
    if unproven := _unproven(job):
        kind, against = Kind.NOT_PROVEN, unproven
    elif Outcome.CAUTION in outcomes:
        kind = Kind.WITH_CARE
        against = next(c.against for c in checks if c.outcome is Outcome.CAUTION)
    else:
        kind, against = Kind.SHIP, _not_measured(job)
    sentence = _fact_for(job, proven=not unproven)
    return Verdict(
        kind,
        f"{sentence}, but {against}." if against else f"{sentence}.",
        _below(job, kind),
        checks,
    )


def all_checks(job: Job) -> Iterator[Check]:
    """Every check of a job, those of the proof first."""
    for target in job.targets:
        if len(job.adapters) == 1:
            yield from proof_checks(job, target, job.adapters[0])
        else:
            yield from _summed_proof(job, target)
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
    floor = job.number(*place, "floor_perplexity_difference")
    allowed = max((x for x in (limit, floor) if x is not None), default=None)
    if drift is not None and allowed is not None:
        is_floor = floor is not None and allowed == floor
        yield Check(
            _within(abs(drift) <= allowed),
            f"{where}Perplexity of the exported file against the {model}",
            valued(precise_percent(abs(drift)), drift),
            f"{'noise floor' if is_floor else 'limit'} {precise_percent(allowed)}",
            f"its perplexity is {precise_percent(abs(drift))} away, and the limit is "
            f"{precise_percent(allowed)}",
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
    share, least = job.number(*place, "top1_agreement"), job.number(*place, "floor_top1_agreement")
    if share is not None and least is not None:
        yield Check(
            _within(share >= least),
            f"{where}Same likeliest token, against the noise floor",
            tagged(precise_percent(share), share, (*place, "top1_agreement")),
            f"floor {precise_percent(least)}",
            f"it agrees on {precise_percent(share)} of tokens, below the noise floor of "
            f"{precise_percent(least)}",
        )


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
    share, least = (
        job.number(*place, *key) for key in (("top1_agreement",), ("limits", "top1_agreement"))
    )
    if share is not None and least is not None:
        yield Check(
            _within(share >= least),
            f"{where}Same likeliest token",
            tagged(precise_percent(share), share, (*place, "top1_agreement")),
            f"limit {precise_percent(least)}",
            f"it agrees on {precise_percent(share)} of tokens, and the limit is "
            f"{precise_percent(least)}",
        )
    if isinstance(is_equal := job.get(*place, "off_is_equal"), bool):
        yield Check(
            _within(is_equal),
            f"{where}Switching the adapter off gives the base again, bit for bit",
            "yes" if is_equal else "no",
            against="switching the adapter off does not give the base again",
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
        yield Check(
            Outcome.CAUTION,
            f"Tokens on which {runtime(target)} was checked; raise verify.sequences",
            tagged(count(known[name]), known[name], ("parity", target, name, "tokens")),
            f"{count(FEW_TOKENS)} or more expected",
            f"{'it was' if len(known) == 1 else 'they were'} checked on "
            f"{count(known[name])} tokens only",
        )


def _unproven(job: Job) -> str:
    """Why the files are not proven, as the end of a sentence; empty if they are."""
    if not job.targets:
        return "no runtime was checked: the recipe has no export target"
    for target in job.targets:
        for name in job.adapters:
            of = f" of {name}" if len(job.adapters) > 1 else ""
            if (target, name) in job.stale:
                return f"the files{of} for {runtime(target)} changed after the check"
            if not job.parity(target, name):
                return f"the file{of} was not checked in {runtime(target)}"
    return ""


def _fact_for(job: Job, proven: bool) -> str:
    gains = {
        name: change
        for name in job.adapters
        if (kind := job.best_kind(name)) and (change := job.change(kind, "float", name)) is not None
    }
    one = len(job.adapters) == 1
    every = "Both" if len(job.adapters) == 2 else f"All {len(job.adapters)}"
    files = "The exported file computes" if one else f"{every} exported files compute"
    better = {name: change for name, change in gains.items() if change < 0}
    if gains and len(better) == len(gains):
        least = percent(-max(better.values()))
        gain = f"beats the float model by {least} on held-out text"
        if not proven:
            return f"{'The' if one else 'Every'} adapter {gain}{'' if one else ' or more'}"
        if one:
            return f"{files} what you trained and {gain}"
        return (
            f"{files} what you trained, and every adapter beats the float model by {least} or more"
        )
    return f"{files} what you trained" if proven else "The job is finished"


def _not_measured(job: Job) -> str:
    missing = []
    if not job.section("kl"):
        missing.append("KL divergence")
    if not job.section("tasks"):
        missing.append("task accuracy")
    return f"{' and '.join(missing)} {'were' if len(missing) > 1 else 'was'} not measured" * bool(
        missing
    )


def _below(job: Job, kind: Kind) -> str | Markup:
    if kind is Kind.NOT_PROVEN:
        return Markup(
            "Check the files with {}. It runs every file and compares it with the simulation."
        ).format(code(job.verb_command("verify")))
    tokens = [
        job.number("parity", target, name, "tokens")
        for target in job.targets
        for name in job.adapters
    ]
    known = [number for number in tokens if number is not None]
    runtimes = listed([runtime(target) for target in job.targets])
    of_tokens = f" on {count(min(known))} tokens" if known else ""
    each = " each" if len(known) > 1 else ""
    missing = _not_measured(job) if kind is not Kind.SHIP else ""
    rest = f" {missing[:1].upper()}{missing[1:]}." if missing else ""
    return f"Checked in {runtimes}{of_tokens}{each}.{rest}"


def _failure(job: Job, checks: tuple[Check, ...]) -> str:
    failed = [check for check in checks if check.outcome is Outcome.FAILED]
    stage = str(job.get("error", "stage") or "")
    if failed:
        named = next((c for c in failed if c.against), failed[0])
        what = "The exported file does" if len(job.adapters) == 1 else "The exported files do"
        return f"{what} not match the simulation closely enough: {named.against or named.what}."
    return f"The job stopped in stage {stage or 'unknown'}, so there is nothing to ship yet."


def _below_failure(job: Job) -> str:
    stage = job.get("error", "stage")
    return f"Stage {stage} failed; every stage before it is finished and kept." if stage else ""


def _unfinished(job: Job, checks: tuple[Check, ...]) -> Verdict:
    shown = tuple(check for check in checks if check.outcome is not Outcome.MISSING)
    done, plan = finished_stages(job), planned_stages(job)
    stage = str(job.get("run", "stage") or "")
    waiting = f"{len(done)} of {len(plan)} stages are done" if plan else ""
    if job.state != "running":
        word = "was interrupted" if job.state == "interrupted" else "is not complete"
        at = f" in stage {stage}" if job.state == "interrupted" and stage else ""
        sentence = f"No verdict yet: the job {word}{at}{', ' if waiting else ''}{waiting}."
        below: str | Markup = Markup("Run {}: finished stages are not repeated.").format(
            code(job.command)
        )
        return Verdict(Kind.NONE_YET, sentence, below, shown)
    training = job.section("run", "training")
    step, steps = training.get("step"), training.get("steps")
    if step and steps:
        sentence = (
            f"No verdict yet: training {training.get('adapter')} is at step {count(step)} of "
            f"{count(steps)}{_trend(training.get('losses') or [])}."
        )
    else:
        sentence = f"No verdict yet: stage {stage} is running{', ' if waiting else ''}{waiting}."
    below = "This page updates itself after every stage and while an adapter is trained."
    return Verdict(Kind.NONE_YET, sentence, below, shown, step / steps if step and steps else None)


def _trend(losses: list[float]) -> str:
    if len(losses) < 8:
        return ""
    part = max(1, len(losses) // 5)
    start, end = statistics.fmean(losses[:part]), statistics.fmean(losses[-part:])
    return ", and the loss is falling" if end < start else ", and the loss is not falling yet"


def planned_stages(job: Job) -> list[str]:
    """Names of all stages of the job, in order; empty if they were not recorded."""
    plan = job.get("run", "plan")
    return [str(stage) for stage in plan] if isinstance(plan, list) else []


def finished_stages(job: Job) -> dict[str, dict[str, float]]:
    """What was recorded of each finished stage, in order."""
    found = {}
    for verb in job.section("stages"):
        found.update(job.section("stages", verb, "parts"))
    order = {name: n for n, name in enumerate(planned_stages(job))}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def remedies(job: Job) -> list[str | Markup]:
    """What to do about a failed job, most likely first."""
    found: list[str | Markup] = []
    for target in job.targets:
        for name in job.adapters:
            parity = job.section("parity", target, name)
            if parity.get("passed") is not False:
                continue
            sequences = job.number("parity", target, name, "sequences")
            if _is_close(job, target, name) and sequences is not None and sequences < 8:
                found.append(
                    Markup(
                        "<b>Test on more text.</b> {} sequences are few for a limit of {}. Set {} "
                        "to 8 and run the same command. Finished stages are skipped."
                    ).format(
                        count(sequences),
                        precise_percent(job.limit(target, name, "perplexity_difference") or 0),
                        code("verify.sequences"),
                    )
                )
            found.append(
                Markup(
                    "<b>Look at the worst layer</b> under Runtimes: {}, {} steps off. A broken "
                    "layer shows as many steps, not as a small drift."
                ).format(
                    code(str(parity.get("worst_layer") or "unknown")),
                    significant(job.number("parity", target, name, "worst_layer_steps") or 0),
                )
            )
            found.append(
                Markup("<b>Do not use</b> the files in {} until the check has passed.").format(
                    code(f"export/{target}/{name}")
                )
            )
    if not found:
        recorded = job.get("error", "remedy")
        listed_ = recorded if isinstance(recorded, list) else [recorded] if recorded else []
        found += [without_folders(str(line)) for line in listed_]
    return found


def remedy_command(job: Job) -> str:
    """The command to run after a failure."""
    close = [
        (target, name)
        for target in job.targets
        for name in job.adapters
        if job.get("parity", target, name, "passed") is False
        and _is_close(job, target, name)
        and (job.number("parity", target, name, "sequences") or 8) < 8
    ]
    return f"{job.command} --set verify.sequences=8" if close else job.command


def _is_close(job: Job, target: str, adapter: str) -> bool:
    """Whether only the perplexity is off, which a small sample explains."""
    checks = list(proof_checks(job, target, adapter))
    failed = [str(c.what) for c in checks if c.outcome is Outcome.FAILED]
    return bool(failed) and all("Perplexity" in what for what in failed)


def elapsed(job: Job) -> str:
    """Total time of all finished stages, in words."""
    parts = job.section("stages")
    total = sum(job.number("stages", verb, "seconds") or 0.0 for verb in parts)
    return seconds(total)
