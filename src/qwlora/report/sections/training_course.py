"""Did training work? The loss of each step, its mean, and the loss on held-out text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from qwlora.errors import size
from qwlora.report import number_format as form
from qwlora.report.drawing import Drawing, Scale, figure, is_narrow, ticks
from qwlora.report.number_format import count, finite, fixed, three_decimals
from qwlora.report.results_view import Job
from qwlora.report.sections import View, section

MOST_SMOOTHED = 50  # steps
# Above, a point stands for several steps. It shows their largest loss, so that a spike is seen.
MOST_POINTS = 1000


@dataclass(frozen=True)
class Course:
    """The losses of one adapter.

    Args:
        steps: number of steps of the whole training; more than `losses` while it runs.
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

    @property
    def grouped(self) -> int:
        return -(-len(self.losses) // MOST_POINTS)

    @property
    def window(self) -> int:
        """Steps in a mean: a fifth of all, so that the first and the last mean share none."""
        return max(1, min(MOST_SMOOTHED, len(self.losses) // 5))

    @property
    def start(self) -> float:
        """Mean loss of the first `window` steps; `means[-1]` is that of the last."""
        return self.means[self.window - 1]

    @property
    def means(self) -> list[float]:
        # Differences of running sums: a training may have many thousand steps.
        sums, window = [0.0], self.window
        for loss in self.losses:
            sums.append(sums[-1] + loss)
        return [(sums[n] - sums[max(0, n - window)]) / min(n, window) for n in range(1, len(sums))]

    @property
    def final_held_out(self) -> float:
        last = self.held_out[-1][1]
        return dict(self.held_out).get(self.best_step or -1, last) if self.is_evaluated else last


def course(job: Job, adapter: str) -> Course | None:
    """What was measured while `adapter` was trained; None if nothing was."""
    live, train = job.section("run", "training"), job.section("train", adapter)
    is_live = live.get("adapter") == adapter
    has_ends = bool(train) or not is_live
    train = train or (live if is_live else {})
    losses = [x for x in map(finite, train.get("losses") or []) if x is not None]
    if not losses:
        return None
    steps = max(int(train.get("steps") or 0), len(losses))
    evaluations = {
        int(step): float(loss) for step, loss in train.get("evaluations") or [] if finite(loss)
    }
    # Held-out loss before and after training is the logarithm of a perplexity. An adapter that has
    # a start of its own, or continues another, did not start as the base.
    ends = dict[int, float]()
    before, after = job.perplexity("base", adapter), job.perplexity("adapted", adapter)
    starts = {"init", "continue_from"} & job.section("train", adapter, "settings").keys()
    if has_ends and before and not starts:
        ends[0] = math.log(before)
    if has_ends and after:
        ends[steps] = math.log(after)
    return Course(
        losses,
        steps,
        sorted((ends | evaluations).items()),
        bool(evaluations),
        train.get("best_step"),
        finite(train.get("limit")),
    )


@section("training", "Training", "Did training work?", position=20, of_adapter=True)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    run, origin = course(job, adapter), job.origin(adapter)
    if run is None:
        is_there = origin in ("untrained", "imported")
        return {"run": None, "origin": origin, "facts": []} if is_there else None
    is_part = len(run.losses) < run.steps
    is_running = is_part and job.state == "running"
    return {
        "question": "Is training going well?" if is_running else "",
        "hatched": is_part,
        "figure": figure(lambda width: _draw(run, width)),
        "run": run,
        "facts": _facts(job, adapter),
    }


def _draw(run: Course, width: int) -> Drawing:
    means, done = run.means, len(run.losses)
    values = [*run.losses, *(loss for _, loss in run.held_out)]
    values += [run.limit] if run.limit is not None else []
    shown = three_decimals(run.start), three_decimals(means[-1])
    words = f"Training loss, mean of {run.window} steps: from {shown[0]} to {shown[1]}"
    words += f" over {count(done)} of {count(run.steps)} steps."
    for step, loss in run.held_out[:12]:
        words += f" Held-out loss at step {step}: {three_decimals(loss)}."
    left, end, top, bottom = 38, width - 16, 22, 240
    low, high = min(values), max(values)
    margin = 0.06 * ((high - low) or abs(high) or 1)
    x, y = Scale(0, run.steps, left, end), Scale(low - margin, high + margin, bottom, top)
    drawing = Drawing(width, 270, "Training and held-out loss", words)
    marks = ticks(y.low, y.high, 5)
    digits = max(1, -math.floor(math.log10(marks[1] - marks[0]))) if len(marks) > 1 else 2
    for tick in marks:
        drawing.line(left, y(tick), end, y(tick))
        drawing.text(left - 6, y(tick) + 4, fixed(tick, digits), "ax", "end")
    for tick in ticks(0, run.steps, 4 if is_narrow(width) else 6):
        if tick == int(tick) and x(tick) < end - 40:
            drawing.text(x(tick), bottom + 20, count(tick), "ax", "middle")
    drawing.text(end, bottom + 20, f"step {count(run.steps)}", "ax", "end")
    if done < run.steps:
        title = f"Steps {done + 1} to {run.steps}: still to come"
        drawing.rect(x(done), y(y.high), end - x(done), y(y.low) - y(y.high), "hatch", title)
    groups = range(0, done, run.grouped)
    raw = [(x(n + 1), y(max(run.losses[n : n + run.grouped]))) for n in groups]
    drawing.polyline(raw, "mark raw")
    line = [(x(n), y(mean)) for n, mean in enumerate(means, 1)]
    drawing.polyline([*line[: -1 : run.grouped], line[-1]], "mark l-train")
    held_out = [(x(step), y(loss)) for step, loss in run.held_out]
    drawing.polyline(held_out, "l-held2" if run.is_evaluated else "l-held")
    for (step, loss), place in zip(run.held_out, held_out, strict=True):
        is_kept = step == run.best_step
        title = f"Held out, step {step}: {three_decimals(loss)} nats{', kept' * is_kept}"
        drawing.circle(*place, 6 if is_kept else 5, "mark d-held", title)
    training = f"{fixed(means[-1])} training, mean"
    held = f"{fixed(run.held_out[-1][1])} held out" if run.held_out else ""
    drawing.text(left, 12, training, "tt")
    drawing.text(end, 12, held, "th", "end")
    if run.limit is not None:
        drawing.line(left, y(run.limit), end, y(run.limit), "limit")
        drawing.text(left + 4, y(run.limit) - 6, f"divergence limit {fixed(run.limit)}", "ax")
        drawing.circle(x(done), y(run.losses[-1]), 6, "worst", f"Stopped at step {done}")
    return drawing


def _facts(job: Job, adapter: str) -> list[tuple[str, Markup | str]]:
    path, setting = ("train", adapter), job.adapter_settings().get(adapter, {})
    live = path if job.section(*path) else ("run", "training")
    memory = (*path, "peak_rss_bytes") if live == path else ("run", "peak_rss_bytes")
    batch, rate = setting.get("batch_sequences"), setting.get("learning_rate")
    of_batch = f", of {batch} sequence{'s' if batch != 1 else ''}" if batch else ""
    whole = (job.number("base", "weights") or 0) + (job.number("base", "float_weights") or 0)
    trained, warm = job.number(*path, "trainable_parameters") or 0, setting.get("warmup_steps")
    warm_up = f", {warm} warm-up steps" if warm else ""
    steps, parameters = (job.shown(count, *path, key) for key in ("steps", "trainable_parameters"))
    epochs = job.number(*path, "epochs")
    of_batch += f", {epochs:.2g} epochs" if epochs else ""
    share = f" ({form.percent(trained / whole)} of the model)" if whole else ""
    facts: dict[str, Markup | str | None] = {
        "Steps": steps and steps + of_batch,
        "Time per step": job.shown(form.seconds, *live, "step_seconds"),
        "Peak memory": job.shown(size, *memory),
        "Trained parameters": parameters and parameters + share,
        "Learning rate": f"{rate:g}, {setting.get('schedule')}{warm_up}" if rate else None,
        "Precision": job.get(*path, "compute"),
    }
    return [(label, value) for label, value in facts.items() if value]
