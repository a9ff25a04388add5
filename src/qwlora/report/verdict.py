"""The verdict: may these files be shipped? By rule, in this order:

    No verdict yet    the job is not finished
    Do not ship       a check failed, or a stage did
    Not proven        an exported file was not checked against every limit, or changed since
    Ship with care    all checks passed, with a caution
    Ship              all checks passed

A caution: an adapter is not better than the float model by 1%, or by 2 standard errors where those
were measured; two adapters are identical; a file was checked on fewer than 1,000 tokens. What was
not measured never counts as passed.

The sentence is the strongest fact for, ", but ", the strongest fact against.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from enum import Enum

from markupsafe import Markup

from qwlora.messages import duration
from qwlora.report.checks import Check, Outcome, all_checks, outcome_of, proof_checks
from qwlora.report.number_format import count, listed, percent
from qwlora.report.results_view import Job, code, runtime


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


def _unproven(job: Job) -> str:
    """Why the files are not proven, as the end of a sentence; empty if they are."""
    if not job.targets:
        return "no runtime was checked: the recipe has no export target"
    for target in job.targets:
        for name in (*job.adapters, *job.other_cases(target)):
            of = f" of {name}" if len(job.adapters) > 1 else ""
            if (target, name) in job.stale:
                return f"the files{of} for {runtime(target)} changed after the check"
            if outcome_of(list(proof_checks(job, target, name))) is Outcome.MISSING:
                what = "not checked completely" if job.parity(target, name) else "not checked"
                return f"the file{of} was {what} in {runtime(target)}"
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
    places = []
    for target in job.targets:
        tokens = [job.number("parity", target, name, "tokens") for name in job.adapters]
        known = [number for number in tokens if number is not None]
        of_tokens = f" on {count(min(known))} tokens" if known else ""
        places.append(f"{runtime(target)}{of_tokens}{' each' if len(known) > 1 else ''}")
    missing = _not_measured(job) if kind is not Kind.SHIP else ""
    rest = f" {missing[:1].upper()}{missing[1:]}." if missing else ""
    return f"Checked in {listed(places)}.{rest}"


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
    done, plan = job.finished_stages, job.planned_stages
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
    time = ""
    if step and steps and (each := job.number("run", "training", "step_seconds")):
        time = f"About {duration((steps - step) * each)} of training left. "
    below = f"{time}This page updates itself after every stage and while an adapter is trained."
    return Verdict(Kind.NONE_YET, sentence, below, shown, step / steps if step and steps else None)


def _trend(losses: list[float]) -> str:
    if len(losses) < 8:
        return ""
    part = max(1, len(losses) // 5)
    start, end = statistics.fmean(losses[:part]), statistics.fmean(losses[-part:])
    return ", and the loss is falling" if end < start else ", and the loss is not falling yet"
