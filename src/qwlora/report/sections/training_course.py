"""Did training work? The loss of each step, its mean, and the loss on held-out text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from qwlora.report.drawing import Drawing, Scale, figure, ticks
from qwlora.report.number_format import count, fixed, percent, seconds, size
from qwlora.report.results_view import NOT_MEASURED, Job, code, finite, tagged
from qwlora.report.section import Section, View

SMOOTHED = 8  # steps
MOST_STEPS = 2000  # above, a band of the smallest and largest loss for each pixel


@dataclass(frozen=True)
class Course:
    """The losses of one adapter.

    Args:
        steps: of the whole training; more than `losses` while it runs.
        held_out: (step, loss).
        is_evaluated: whether held-out loss was measured during training, not only at both ends.
        limit: the loss above which training counts as diverged, if it did.
    """

    losses: list[float]
    steps: int
    held_out: list[tuple[int, float]]
    is_evaluated: bool
    best_step: int | None
    limit: float | None


def course(job: Job, adapter: str) -> Course | None:
    """What was measured while `adapter` was trained; None if nothing was."""
    live = job.section("run", "training")
    is_live = live.get("adapter") == adapter
    train = job.section("train", adapter) or (live if is_live else {})
    losses = [x for x in map(finite, train.get("losses") or []) if x is not None]
    if not losses:
        return None
    steps = max(int(train.get("steps") or 0), len(losses))
    evaluations = [
        (int(step), float(loss)) for step, loss in train.get("evaluations") or [] if finite(loss)
    ]
    held_out = list(evaluations)
    ends = _ends(job, adapter, steps) if not is_live or job.section("train", adapter) else []
    known = {step for step, _ in held_out}
    held_out = sorted([*held_out, *(end for end in ends if end[0] not in known)])
    return Course(
        losses,
        steps,
        held_out,
        bool(evaluations),
        train.get("best_step"),
        finite(train.get("limit")),
    )


def _ends(job: Job, adapter: str, steps: int) -> list[tuple[int, float]]:
    """Held-out loss before and after training: the logarithms of two perplexities."""
    before, after = job.perplexity("base", adapter), job.perplexity("adapted", adapter)
    starts = job.get("train", adapter, "settings", "init") in (None, "zero")
    ends = [(0, math.log(before))] if before and starts else []
    return [*ends, (steps, math.log(after))] if after else ends


def view(job: Job, adapter: str | None) -> View | None:
    """What the template draws."""
    name = adapter or job.adapters[0]
    found = course(job, name)
    if found is None:
        return None
    running = len(found.losses) < found.steps and job.state == "running"
    return {
        "question": "Is training going well?" if running else "Did training work?",
        "hatched": len(found.losses) < found.steps,
        "figure": figure(lambda width: _draw(found, width)),
        "answer": _answer(job, name, found),
        "facts": _facts(job, name),
    }


def smoothed(losses: list[float]) -> list[float]:
    """The mean of up to the last 8 losses at each step."""
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    return [(sums[n] - sums[max(0, n - SMOOTHED)]) / min(n, SMOOTHED) for n in range(1, len(sums))]


def _draw(found: Course, width: int) -> Drawing:
    narrow = width < 500
    left, right, bottom, top = 38, (16 if narrow else 150), 240, 22
    means = smoothed(found.losses)
    values = [*found.losses, *(loss for _, loss in found.held_out)]
    values += [found.limit] if found.limit is not None else []
    low, high = min(values), max(values)
    margin = 0.06 * ((high - low) or abs(high) or 1)
    x = Scale(0, found.steps, left, width - right)
    y = Scale(low - margin, high + margin, bottom, top)
    drawing = Drawing(width, 270, "Training and held-out loss", _description(found, means))
    marks = ticks(y.low, y.high, 5)
    digits = max(0, -math.floor(math.log10(marks[1] - marks[0]))) if len(marks) > 1 else 2
    for tick in marks:
        drawing.line(left, y(tick), width - right, y(tick))
        drawing.text(left - 6, y(tick) + 4, fixed(tick, max(digits, 1)), "ax", "end")
    for tick in ticks(0, found.steps, 4 if narrow else 6):
        if tick == int(tick) and x(tick) < width - right - 40:
            drawing.text(x(tick), bottom + 20, count(tick), "ax", "middle")
    drawing.text(width - right, bottom + 20, f"step {count(found.steps)}", "ax", "end")
    done = len(found.losses)
    if done < found.steps:
        title = f"Steps {done + 1} to {found.steps}: still to come"
        drawing.rect(x(done), top, width - right - x(done), bottom - top, "hatch", title)
    points = [(x(n), y(loss)) for n, loss in enumerate(found.losses, 1)]
    if done > MOST_STEPS:
        _band(drawing, points)
    else:
        drawing.polyline(points, "mark raw")
    drawing.polyline(_thinned([(x(n), y(m)) for n, m in enumerate(means, 1)]), "mark l-train")
    _held_out(drawing, found, x, y)
    _words(drawing, found, means[-1], y, None if narrow else x(done) + 10)
    if found.limit is not None:
        drawing.line(left, y(found.limit), width - right, y(found.limit), "limit")
        drawing.text(left + 4, y(found.limit) - 6, f"divergence limit {fixed(found.limit)}", "ax")
        drawing.circle(x(done), y(found.losses[-1]), 6, "worst", f"Stopped at step {done}")
    return drawing


def _held_out(drawing: Drawing, found: Course, x: Scale, y: Scale) -> None:
    points = [(x(step), y(loss)) for step, loss in found.held_out]
    drawing.polyline(points, "l-held" if not found.is_evaluated else "l-held2")
    for step, loss in found.held_out:
        best = ", kept" if step == found.best_step else ""
        title = f"Held out, step {step}: {fixed(loss, 3)} nats{best}"
        drawing.circle(x(step), y(loss), 6 if best else 5, "mark d-held", title)


def _words(drawing: Drawing, found: Course, mean: float, y: Scale, beside: float | None) -> None:
    """The last losses: beside the ends of their lines, or above the plot where that is narrow."""
    training = f"{fixed(mean)} training, mean"
    held_out = f"{fixed(found.held_out[-1][1])} held out" if found.held_out else ""
    if beside is None:
        drawing.text(38, 12, training, "tt")
        drawing.text(drawing.width - 16, 12, held_out, "th", "end")
        return
    end, last = y(mean), y(found.held_out[-1][1]) if found.held_out else None
    apart = last is not None and abs(last - end) < 16
    below = (16 if last is not None and last <= end else -12) if apart else 0
    drawing.text(beside, end + 4 + below, training, "tt")
    if last is not None:
        drawing.text(beside, last + 4, held_out, "th")


def _band(drawing: Drawing, points: list[tuple[float, float]]) -> None:
    columns: dict[int, list[float]] = {}
    for px, py in points:
        columns.setdefault(int(px), []).append(py)
    upper = [(float(px), min(ys)) for px, ys in columns.items()]
    lower = [(float(px), max(ys)) for px, ys in columns.items()]
    drawing.band(upper, lower, "mark band")


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most two points a pixel."""
    step = max(1, len(points) // 1500)
    return [*points[::step], points[-1]] if step > 1 else points


def _description(found: Course, means: list[float]) -> str:
    held = "".join(f" Held-out loss at step {s}: {fixed(v, 3)}." for s, v in found.held_out[:12])
    return (
        f"Training loss, mean of {SMOOTHED} steps: from {fixed(means[0], 3)} to "
        f"{fixed(means[-1], 3)} over {count(len(means))} of {count(found.steps)} steps.{held}"
    )


def _answer(job: Job, adapter: str, found: Course) -> Markup:
    first, last = found.losses[0], smoothed(found.losses)[-1]
    done = len(found.losses)
    if found.limit is not None:
        return Markup(
            "<b>No: it diverged at step {}.</b> The loss was {}, above the limit of {}."
        ).format(count(done), fixed(found.losses[-1]), fixed(found.limit))
    if done < found.steps:
        word = "So far, yes" if last < first else "Not yet"
        return Markup(
            "<b>{}: step {} of {}, loss {} at first and {} now.</b> No step was above the "
            "divergence limit."
        ).format(word, count(done), count(found.steps), fixed(first), fixed(last))
    if len(found.held_out) < 2:
        word = "The training loss fell" if last < first else "The training loss did not fall"
        return Markup("<b>{}: {} to {} nats per token.</b> On held-out text: {}.").format(
            word, fixed(first), fixed(last), NOT_MEASURED
        )
    (first_step, before), (_, after) = found.held_out[0], found.held_out[-1]
    if found.is_evaluated and found.best_step is not None:
        after = dict(found.held_out).get(found.best_step, after)
    fell = after < before
    sentence = Markup("<b>{}: held-out loss {} from {}{} to {} nats per token.</b> ").format(
        "Yes" if fell else "No",
        "fell" if fell else "rose",
        fixed(before),
        f" at step {first_step}" if first_step else "",
        fixed(after),
    )
    if found.is_evaluated:
        kept = f"The adapter of step {count(found.best_step)} was kept." if found.best_step else ""
        return sentence + kept
    return sentence + Markup(
        "Between start and end it was {}. Set {} to see where it stops falling."
    ).format(NOT_MEASURED, code(f"evaluation_steps: {max(1, found.steps // 6)}"))


def _facts(job: Job, adapter: str) -> list[tuple[str, Markup | str]]:
    train, path = job.section("train", adapter), ("train", adapter)
    if not train:
        return []
    setting = _setting(job, adapter)
    facts: list[tuple[str, Markup | str]] = []
    steps = job.number(*path, "steps")
    batch = setting.get("batch_sequences")
    of = f", of {batch} sequence{'s' if batch != 1 else ''}" if batch else ""
    if steps is not None:
        facts.append(("Steps", tagged(count(steps), steps, (*path, "steps")) + of))
    for key, label, write in (
        ("step_seconds", "Time per step", seconds),
        ("peak_rss_bytes", "Peak memory", size),
    ):
        if (value := job.number(*path, key)) is not None:
            facts.append((label, tagged(write(value), value, (*path, key))))
    if (trained := job.number(*path, "trainable_parameters")) is not None:
        whole = (job.number("base", "weights") or 0) + (job.number("base", "float_weights") or 0)
        share = f" ({percent(trained / whole)} of the model)" if whole else ""
        place = (*path, "trainable_parameters")
        facts.append(("Trained parameters", tagged(count(trained), trained, place) + share))
    if rate := setting.get("learning_rate"):
        warm = setting.get("warmup_steps")
        rest = f", {setting.get('schedule')}" + (f", {warm} warm-up steps" if warm else "")
        facts.append(("Learning rate", f"{rate:g}{rest}"))
    if compute := train.get("compute"):
        facts.append(("Precision", str(compute)))
    return facts


def _setting(job: Job, adapter: str) -> dict[str, Any]:
    listed = job.setting("adapters")
    found = [a for a in listed if a.get("name") == adapter] if isinstance(listed, list) else []
    return found[0] if found else {}


SECTION = Section(
    "training",
    "Training",
    "Did training work?",
    "training_course.html",
    view,
    of_job=False,
    of_adapter=True,
)
