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

from qwlora.errors import duration
from qwlora.report.evidence import Evidence, Outcome, all_evidence, outcome_of, proof_evidence
from qwlora.report.number_format import count, listed, percent, significant
from qwlora.report.results_view import (
    BASE,
    Job,
    capitalized,
    code,
    is_of_perplexity,
    runtime,
    without_folders,
)

ENOUGH_SEQUENCES = 8  # of a proof whose perplexity is off; fewer differ this much by chance


class VerdictKind(Enum):
    """A verdict: its name, and the class of its color."""

    NONE_YET = ("No verdict yet", "run")
    DO_NOT_SHIP = ("Do not ship", "bad")
    NOT_PROVEN = ("Not proven", "unp")
    WITH_CARE = ("Ship with care", "warn")
    SHIP = ("Ship", "ok")

    def __init__(self, label: str, color: str):
        self.label, self.color = label, color


@dataclass(frozen=True)
class Verdict:
    """The verdict, its sentence, the line below it, and the evidence that it follows from.

    Args:
        progress: of the stage that runs, from 0 to 1.
    """

    kind: VerdictKind
    sentence: str
    below: str | Markup
    evidence: tuple[Evidence, ...]
    progress: float | None = None


def verdict(job: Job) -> Verdict:
    """Apply the rules to a job."""
    evidence = tuple(all_evidence(job))
    outcomes = {item.outcome for item in evidence}
    if job.state in ("running", "interrupted", "incomplete"):
        shown = tuple(f for f in evidence if f.outcome is not Outcome.MISSING)
        return _of_running(job, shown) if job.state == "running" else _of_stopped(job, shown)
    if job.state == "failed" or Outcome.FAILED in outcomes:
        stage = job.get("error", "stage")
        kept = f"Stage {stage} failed; every stage before it is finished and kept."
        below = kept if stage else ""
        return Verdict(VerdictKind.DO_NOT_SHIP, _failure(job, evidence), below, evidence)
    if unproven := _unproven(job):
        kind, against = VerdictKind.NOT_PROVEN, unproven
    elif Outcome.CAUTION in outcomes:
        kind = VerdictKind.WITH_CARE
        against = next(f.against for f in evidence if f.outcome is Outcome.CAUTION)
    else:
        kind, against = VerdictKind.SHIP, _not_measured(job)
    sentence = _strongest_fact(job, is_proven=not unproven)
    sentence = f"{sentence}, but {against}." if against else f"{sentence}."
    return Verdict(kind, sentence, _below(job, kind), evidence)


def _unproven(job: Job) -> str:
    """Why the files are not proven, as the end of a sentence; empty if they are."""
    if not job.targets:
        return "no runtime was checked: the recipe has no export target"
    for target in job.targets:
        for name in (*job.adapters, *job.other_cases(target)):
            of = f" of {name}" if len(job.adapters) > 1 else ""
            if (target, name) in job.stale:
                return f"the files{of} for {runtime(target)} changed after the check"
            if outcome_of(proof_evidence(job, target, name)) is Outcome.MISSING:
                completely = " completely" if job.parity(target, name) else ""
                return f"the file{of} was not checked{completely} in {runtime(target)}"
    return ""


def _strongest_fact(job: Job, is_proven: bool) -> str:
    count_ = len(job.adapters)
    several = (
        "Both exported files compute" if count_ == 2 else f"All {count_} exported files compute"
    )
    files = "The exported file computes" if count_ == 1 else several
    gains = job.gains()
    if not gains or max(gains.values()) >= 0:
        return f"{files} what you trained" if is_proven else "The job is finished"
    gain = f"beats the float model by {percent(-max(gains.values()))}"
    if not is_proven:
        who, more = ("The", "") if count_ == 1 else ("Every", " or more")
        return f"{who} adapter {gain} on held-out text{more}"
    if count_ == 1:
        return f"{files} what you trained and {gain} on held-out text"
    return f"{files} what you trained, and every adapter {gain} or more"


def _not_measured(job: Job) -> str:
    keys = {"kl": "KL divergence", "tasks": "task accuracy"}
    missing = [words for key, words in keys.items() if not job.section(key)]
    verb = "were" if len(missing) > 1 else "was"
    return f"{' and '.join(missing)} {verb} not measured" if missing else ""


def _below(job: Job, kind: VerdictKind) -> str | Markup:
    if kind is VerdictKind.NOT_PROVEN:
        return Markup(
            "Check the files with {}. It runs every file and compares it with the simulation."
        ).format(code(job.verb_command("verify")))
    places = []
    for target in job.targets:
        tokens = [job.number("parity", target, name, "tokens") for name in job.adapters]
        known = [number for number in tokens if number is not None]
        on_tokens = f" on {count(min(known))} tokens" if known else ""
        places.append(f"{runtime(target)}{on_tokens}{' each' if len(known) > 1 else ''}")
    missing = capitalized(_not_measured(job)) if kind is not VerdictKind.SHIP else ""
    return f"Checked in {listed(places)}.{f' {missing}.' if missing else ''}"


def _failure(job: Job, evidence: tuple[Evidence, ...]) -> str:
    failed = [f for f in evidence if f.outcome is Outcome.FAILED]
    if not failed:
        stage = job.get("error", "stage") or "unknown"
        return f"The job stopped in stage {stage}, so there is nothing to ship yet."
    item = next((f for f in failed if f.against), failed[0])
    what = "The exported file does" if len(job.adapters) == 1 else "The exported files do"
    return f"{what} not match the simulation closely enough: {item.against or item.what}."


def _stages_done(job: Job) -> str:
    plan = job.planned_stages
    return f", {len(job.finished_stages)} of {len(plan)} stages are done" if plan else ""


def _of_stopped(job: Job, evidence: tuple[Evidence, ...]) -> Verdict:
    """Of a job that was interrupted, or of which some stages were not run."""
    stage, sentence = job.get("run", "stage"), "The job is not complete"
    if job.state == "interrupted":
        sentence = f"The job was interrupted{f' in stage {stage}' if stage else ''}"
    below = Markup("Run {}: finished stages are not repeated.").format(code(job.command))
    return Verdict(VerdictKind.NONE_YET, f"{sentence}{_stages_done(job)}.", below, evidence)


def _of_running(job: Job, evidence: tuple[Evidence, ...]) -> Verdict:
    training = job.section("run", "training")
    step, steps = training.get("step"), training.get("steps")
    below = "This page updates itself after every stage and while an adapter is trained."
    if not step or not steps:
        sentence = f"Stage {job.get('run', 'stage') or ''} is running{_stages_done(job)}."
        return Verdict(VerdictKind.NONE_YET, sentence, below, evidence)
    sentence = (
        f"Training of {training.get('adapter')} is at step {count(step)} of {count(steps)}"
        f"{_trend(training.get('losses') or [])}."
    )
    if step_seconds := job.number("run", "training", "step_seconds"):
        below = f"About {duration((steps - step) * step_seconds)} of training left. {below}"
    return Verdict(VerdictKind.NONE_YET, sentence, below, evidence, step / steps)


def _trend(losses: list[float]) -> str:
    if len(losses) < 8:
        return ""
    part = max(1, len(losses) // 5)
    start, end = statistics.fmean(losses[:part]), statistics.fmean(losses[-part:])
    return ", and the loss is falling" if end < start else ", and the loss is not falling yet"


def remedies(job: Job) -> tuple[list[str | Markup], str]:
    """What to do about a failed job, most likely first, and the command to run then: what the error
    recorded, after what the figures of a failed proof suggest."""
    lines: list[str | Markup] = []
    options = ""
    proofs = [(target, name) for target in job.targets for name in (*job.adapters, BASE)]
    for target, name in proofs:
        failed = [row for row in job.proof_rows(target, name) if not row.passed]
        sequences = job.number("parity", target, name, "sequences") or ENOUGH_SEQUENCES
        # a small sample explains a perplexity that is off, and nothing else
        is_small = sequences < ENOUGH_SEQUENCES and failed
        if is_small and all(is_of_perplexity(row) for row in failed):
            options = f" --set verify.sequences={ENOUGH_SEQUENCES}"
            lines.append(
                Markup(
                    "<b>Test on more text.</b> {} sequences are few for a limit of {}. Set {} "
                    "to {} and run the same command. Finished stages are skipped."
                ).format(
                    count(sequences),
                    failed[0].shown_limit,
                    code("verify.sequences"),
                    ENOUGH_SEQUENCES,
                )
            )
        steps = job.number("parity", target, name, "worst_layer_steps")
        if failed and steps is not None:
            lines.append(
                Markup(
                    "<b>Look at the worst layer</b> under Runtimes: {}, {} steps off. A broken "
                    "layer shows as many steps, not as a small drift."
                ).format(
                    code(str(job.get("parity", target, name, "worst_layer"))), significant(steps)
                )
            )
    recorded = job.get("error", "remedy")
    lines += [without_folders(str(line)) for line in recorded or [] if isinstance(recorded, list)]
    return lines, without_folders(job.command) + options
