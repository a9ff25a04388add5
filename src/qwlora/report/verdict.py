"""The verdict: may these files be shipped? By rule, in this order:

    No verdict yet    the job is not finished
    Do not ship       a check failed, or a stage did
    Not proven        an exported file was not checked against every limit, or changed since
    Ship with care    all checks passed, with a caution
    Ship              all checks passed

A caution: the base loses much on an adapter's text, an adapter gains too little, or a file was
checked on few tokens. With `reference: float`, an adapter is compared with the same one trained on
the float model (float LoRA), and that one with the float model.

Missing measurements never count as passed. `targets/proof` judged the checks of a proof. The
sentence joins the strongest fact for and the strongest fact against shipping by "but".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from markupsafe import Markup

from qwlora.report import number_format as form
from qwlora.report.number_format import NOT_MEASURED, count, listed, percent, tagged
from qwlora.report.results_view import Job, capitalized, code, runtime, without_folders
from qwlora.system.parameter_names import BASE
from qwlora.targets.proof.checks import Check

NO_ADAPTER = "none"  # the use case of the base, in targets of use cases
LEAST_GAIN = 0.01  # an adapter should beat the float model by this much
MOST_LOST = 0.1  # a base should be at most this much over the float model on an adapter's text
MOST_OVER = 0.05  # an adapter should end at most this much over the same one on the float model
FEW_TOKENS = 1000  # a proof on fewer tokens is a caution


class VerdictKind(Enum):
    """A verdict: its name, and the class of its color."""

    NONE_YET = ("No verdict yet", "run")
    DO_NOT_SHIP = ("Do not ship", "bad")
    NOT_PROVEN = ("Not proven", "unp")
    WITH_CARE = ("Ship with care", "warn")
    SHIP = ("Ship", "ok")

    def __init__(self, label: str, color: str):
        self.label, self.color = label, color


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
    """One line under the verdict: the check, its result and limit as text, the end of the verdict's
    sentence if it speaks against shipping, and the number of checks that the line represents."""

    outcome: Outcome
    what: str | Markup
    value: str | Markup = NOT_MEASURED
    limit: str = ""
    against: str = ""
    count: int = 1


@dataclass(frozen=True)
class Verdict:
    """The verdict, and the progress of the stage that runs, from 0 to 1."""

    kind: VerdictKind
    sentence: str
    below: str | Markup
    evidence: tuple[Evidence, ...]
    progress: float | None = None


def verdict(job: Job) -> Verdict:
    """Apply the rules to a job."""
    evidence = tuple(_all_evidence(job))
    outcomes = {item.outcome for item in evidence}
    # In an unfinished job, what was not measured may still be.
    if job.state in ("running", "interrupted", "incomplete"):
        return _unfinished(job, tuple(f for f in evidence if f.outcome is not Outcome.MISSING))
    if job.state == "failed" or Outcome.FAILED in outcomes:
        stage = job.get("error", "stage")
        kept = f"Stage {stage} failed; every stage before it is finished and kept."
        sentence = _failure(job, evidence)
        return Verdict(VerdictKind.DO_NOT_SHIP, sentence, kept if stage else "", evidence)
    if unproven := _unproven(job):
        kind, against = VerdictKind.NOT_PROVEN, unproven
    elif Outcome.CAUTION in outcomes:
        kind = VerdictKind.WITH_CARE
        against = next(f.against for f in evidence if f.outcome is Outcome.CAUTION)
    else:
        kind, against = VerdictKind.SHIP, _not_measured(job)
    but = f", but {against}" if against else ""
    sentence = f"{_strongest_fact(job, is_proven=not unproven)}{but}."
    return Verdict(kind, sentence, _below(job, kind), evidence)


def outcome_of(evidence: Iterable[Evidence]) -> Outcome:
    """The worst outcome; `MISSING` if nothing was checked."""
    outcomes = {item.outcome for item in evidence} or {Outcome.MISSING}
    return next(outcome for outcome in Outcome if outcome in outcomes)


def proof_evidence(job: Job, target: str, case: str) -> list[Evidence]:
    """The checks of the proof of one exported file."""
    where = "" if len(job.targets) == 1 else f"{runtime(target)}: "
    if (reason := job.stale.get((target, case))) is not None:
        what = f"{where}Files of {case} changed after the check: {reason}"
        return [Evidence(Outcome.MISSING, what)]
    evidence = []
    recorded = job.get("parity", target, case, "checks")
    recorded = recorded if isinstance(recorded, list) else ()
    rows = [Check.from_json(row) for row in recorded if isinstance(row, Mapping)]
    for number, row in enumerate(rows):
        what, value = f"{where}{capitalized(row.what)}", row.shown_value
        if (exact := form.finite(row.value)) is not None:
            value = tagged(value, exact, ("parity", target, case, "checks", number, "value"))
        outcome = Outcome.PASSED if row.passed else Outcome.FAILED
        evidence.append(Evidence(outcome, what, value, row.shown_limit, row.sentence))
    why = job.get("parity", target, case, "not_run")
    if why or not evidence:
        what = f"{where}Exported file against what was trained{f': {why}' if why else ''}"
        evidence.append(Evidence(Outcome.MISSING, what))
    return evidence


def _all_evidence(job: Job) -> Iterator[Evidence]:
    # Proofs come first: the first caution is the one in the verdict's sentence.
    for target in job.targets:
        yield from _of_target(job, target)
    for adapter in job.adapters:
        yield from _gain(job, adapter)
        yield from _base_loss(job, adapter)
    for target in job.targets:
        yield from _few_tokens(job, target)


def _of_target(job: Job, target: str) -> Iterator[Evidence]:
    # Each failed check has a line. Passed checks have a line each for a single adapter; for several
    # adapters they share one line, because a hundred adapters would have thousands.
    alone = [case for case in job.cases(target) if case in job.adapters]
    proofs = {name: proof_evidence(job, target, name) for name in alone}
    outcomes = {name: outcome_of(evidence) for name, evidence in proofs.items()}
    if len(proofs) == 1:
        (evidence,) = proofs.values()
        yield from evidence
    elif proofs:
        passed = [name for name in proofs if outcomes[name] is Outcome.PASSED]
        failed = [name for name in proofs if outcomes[name] is Outcome.FAILED]
        yield Evidence(
            outcome_of(item for evidence in proofs.values() for item in evidence),
            f"{runtime(target)} computes what was trained{job.arithmetic([target], passed)}: "
            f"{listed(passed) or 'no adapter yet'}",
            f"{len(passed)} of {len(proofs)}",
            "passed",
            f"{listed(sorted(failed))} did not pass",
            count=sum(map(len, proofs.values())),
        )
        for name in failed:
            yield from _failed(proofs[name], name)
    for case in [case for case in job.cases(target) if case not in proofs]:
        is_base = case in (BASE, NO_ADAPTER)
        what = "the base without an adapter" if is_base else f"{case} together"
        evidence = proof_evidence(job, target, case)
        outcome = outcome_of(evidence)
        yield Evidence(
            outcome,
            f"{runtime(target)} computes {what}",
            {Outcome.PASSED: "yes", Outcome.FAILED: "no"}.get(outcome, NOT_MEASURED),
            against=f"the files do not compute {what}",
            count=len(evidence),
        )
        yield from _failed(evidence, "without an adapter" if is_base else case)


def _failed(evidence: list[Evidence], where: str) -> Iterator[Evidence]:
    for item in evidence:
        if item.outcome is Outcome.FAILED:
            yield replace(item, what=f"{where}: {item.what}", against=f"{where}: {item.against}")


def _gain(job: Job, adapter: str) -> Iterator[Evidence]:
    if (kind := job.final_kind(adapter)) is None:
        return
    is_only = len(job.adapters) == 1
    name = ("Simulated adapter" if kind == "simulated" else "Adapter") if is_only else adapter
    who = "the adapter" if is_only else adapter
    # An adapter close to float LoRA gained as much as float LoRA did. Whether training helped at
    # all is then a question about float LoRA.
    if (over := job.change(kind, "reference", adapter)) is not None:
        yield Evidence(
            Outcome.PASSED if over <= MOST_OVER else Outcome.CAUTION,
            f"{name} against float LoRA, held-out text",
            tagged(percent(over, sign=True), over),
            f"at most {percent(MOST_OVER, digits=0)} over it expected",
            f"{who} is {percent(over)} over float LoRA on held-out text",
        )
        kind, name = "reference", "Float LoRA" if is_only else f"Float LoRA of {adapter}"
        who = name[:1].lower() + name[1:]
    reference, model = "float", "float model"
    least, needed = LEAST_GAIN, f"better by {LEAST_GAIN:.0%} expected"
    # Two standard errors of the ratio of both perplexities, which share their text.
    if (stderr := job.number("perplexity_ratio", kind, adapter, "stderr")) is not None:
        least, percentage = 2 * stderr, form.precise_percent(2 * stderr)
        needed = f"better by 2 standard errors ({percentage}) expected"
    if job.change(kind, "float", adapter) is None:
        reference, model = "base", "packed base"
        least, needed = 0.0, "better expected, as there is no float model"
    if (change := job.change(kind, reference, adapter)) is None:
        yield Evidence(Outcome.MISSING, f"{name} against the float model")
        return
    is_better = change < 0 and -change >= least
    shown = f"not clearly better than the {model} on held-out text ({percent(change)})"
    if change > 0:
        shown = f"{percent(change)} worse than the {model} on held-out text"
    yield Evidence(
        Outcome.PASSED if is_better else Outcome.CAUTION,
        f"{name} against the {model}, held-out text",
        tagged(percent(change, sign=True), change),
        "perplexity" if is_better else needed,
        f"{who} is {shown}",
    )


def _base_loss(job: Job, adapter: str) -> Iterator[Evidence]:
    # Float LoRA, if measured, shows how much of this loss remains after training.
    lost = job.change("base", "float", adapter)
    if lost is None or lost <= MOST_LOST or job.perplexity("reference", adapter):
        return
    where = "held-out text" if len(job.adapters) == 1 else f"the text of {adapter}"
    yield Evidence(
        Outcome.CAUTION,
        f"Packed base against the float model, {where}",
        tagged(percent(lost, sign=True), lost),
        f"at most {percent(MOST_LOST, digits=0)} over it expected",
        f"the base is {percent(lost)} over the float model on {where}",
    )


def _tokens(job: Job, target: str) -> dict[str, float]:
    numbers = {name: job.number("parity", target, name, "tokens") for name in job.adapters}
    return {name: number for name, number in numbers.items() if number is not None}


def _few_tokens(job: Job, target: str) -> Iterator[Evidence]:
    known, is_one = _tokens(job, target), _file_count(job) == 1
    name = min(known, key=lambda n: known[n], default="")
    if not known or known[name] >= FEW_TOKENS:
        return
    yield Evidence(
        Outcome.CAUTION,
        f"Tokens checked in {runtime(target)} (verify.sequences)",
        tagged(count(known[name]), known[name], ("parity", target, name, "tokens")),
        f"{count(FEW_TOKENS)} or more expected",
        f"{'it was' if is_one else 'they were'} checked on {count(known[name])} tokens only",
    )


def _unproven(job: Job) -> str:
    if not job.targets:
        return "no runtime was checked: the recipe has no export target"
    for target in job.targets:
        for name in job.cases(target):
            of = f" of {name}" if len(job.adapters) > 1 else ""
            if (target, name) in job.stale:
                return f"the files{of} for {runtime(target)} changed after the check"
            if outcome_of(proof_evidence(job, target, name)) is Outcome.MISSING:
                parity = job.section("parity", target, name)
                completely = " completely" if parity and "not_run" not in parity else ""
                return f"the file{of} was not checked{completely} in {runtime(target)}"
    return ""


def _file_count(job: Job) -> int:
    return sum(len(set(job.cases(target)) - {BASE, NO_ADAPTER}) for target in job.targets)


def _strongest_fact(job: Job, is_proven: bool) -> str:
    files, gains = _file_count(job), job.gains()
    few = {1: "The exported file computes", 2: "Both exported files compute"}
    overs, plain = job.gains("reference"), "The job is finished"
    if is_proven:
        plain = f"{few.get(files, f'All {files} exported files compute')} what you trained"
        plain += job.arithmetic(job.targets, job.adapters)
    if overs and max(overs.values()) <= MOST_OVER:
        most, are_several = max(overs.values()), len(overs) > 1
        side, bound = ("over", "at most ") if most > 0 else ("under", "at least ")
        distance = f"{bound * are_several}{percent(abs(most))} {side} float LoRA on held-out text"
        if is_proven:
            return f"{plain}, {distance}"
        return f"The {'adapters are' if are_several else 'adapter is'} {distance}"
    are_clear = all(e.outcome is Outcome.PASSED for n in job.adapters for e in _gain(job, n))
    if overs or not gains or not are_clear:
        return plain
    gain = f"beats the float model by {percent(-max(gains.values()))}"
    who, more = ("the", "") if len(job.adapters) == 1 else ("every", " or more")
    if not is_proven:
        return f"{who.capitalize()} adapter {gain} on held-out text{more}"
    if files == 1:
        return f"{plain} and {gain} on held-out text"
    return f"{plain}, and {who} adapter {gain}{more}"


def _not_measured(job: Job) -> str:
    keys = {"kl": "KL divergence", "tasks": "task accuracy"}
    missing = [words for key, words in keys.items() if not job.section(key)]
    verb = "were" if len(missing) > 1 else "was"
    return f"{' and '.join(missing)} {verb} not measured" if missing else ""


def _below(job: Job, kind: VerdictKind) -> str | Markup:
    if kind is VerdictKind.NOT_PROVEN:
        return Markup(
            "Check the files with {}. It runs every file and compares it with what was trained."
        ).format(job.verb_command("verify"))
    places = []
    for target in job.targets:
        known = _tokens(job, target).values()
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
    what = "The exported file does" if _file_count(job) == 1 else "The exported files do"
    return f"{what} not compute what was trained: {item.against or item.what}."


def _unfinished(job: Job, evidence: tuple[Evidence, ...]) -> Verdict:
    stage, training = job.get("run", "stage"), job.section("run", "training")
    step, steps, plan = training.get("step"), training.get("steps"), job.planned_stages
    done = f", {len(job.finished_stages)} of {len(plan)} stages are done" if plan else ""
    below: str | Markup = (
        "This page updates itself after every stage and while an adapter is trained."
    )
    progress = None
    if job.state != "running":
        sentence = "The job is not complete"
        if job.state == "interrupted":
            sentence = f"The job was interrupted{f' in stage {stage}' if stage else ''}"
        sentence += f"{done}."
        below = Markup("Run {}: finished stages are not repeated.").format(code(job.command))
    elif step and steps:
        who = training.get("adapter")
        sentence = f"Training of {who} is at step {count(step)} of {count(steps)}."
        progress = step / steps
        if step_seconds := job.number("run", "training", "step_seconds"):
            left = form.seconds((steps - step) * step_seconds)
            below = f"About {left} of training left. {below}"
    else:
        sentence = f"Stage {stage or ''} is running{done}."
    return Verdict(VerdictKind.NONE_YET, sentence, below, evidence, progress)


def remedies(job: Job) -> list[str]:
    """What to do about a failed job, most likely first, as the error recorded it."""
    return [without_folders(line) for line in job.get("error", "remedy") or ()]
