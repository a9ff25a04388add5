"""What did each stage cost? A waterfall of perplexities on a logarithmic axis, and its table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from qwlora.report import number_format as form
from qwlora.report.drawing import Drawing, Scale, figure, is_narrow, shortened
from qwlora.report.number_format import TIMES, percent, perplexity, precise_percent, three_decimals
from qwlora.report.results_view import KINDS, Job, runtime
from qwlora.report.sections import Cell, Table, View, section


@dataclass(frozen=True)
class Step:
    """A bar from `before` to `after`; without `after` the stage was not measured.

    Args:
        detail: below the name.
        value: instead of the perplexity, if `after` is no measured one.
    """

    name: str
    detail: str
    before: float | None
    after: float | None
    value: str = ""

    @property
    def change(self) -> str:
        """The relative change in words."""
        if self.before is None or self.after is None:
            return ""
        change = self.after / self.before - 1
        return (precise_percent if abs(change) < 0.01 else percent)(change, True)


@section("stages", "Cost by stage", "What did each stage cost?", position=20, of_adapter=True)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    steps = _steps(job, adapter)
    if sum(step.after is not None for step in steps) < 2:
        return None
    missing = "waiting" if job.state == "running" else "not measured"
    packing, training = job.change("base", "float", adapter), job.change("adapted", "base", adapter)
    won_back = packing and training and -math.log1p(training) / math.log1p(packing)
    return {
        "figure": figure(lambda width: _draw(steps, width, missing)),
        "packing": packing,
        "training": training,
        "won_back": won_back,  # as a share of what packing cost
        "note": _note(job, adapter),
        "table": _table(job, adapter),
    }


def _steps(job: Job, adapter: str) -> list[Step]:
    """One for each stage, and for the files of each target."""
    bits, activation_bits = job.bitwidth, job.setting("simulation", "activation_bitwidth")
    trained = job.number("train", adapter, "steps")
    details = {
        "float": "as loaded",
        "base": f"{bits}-bit, {job.setting('base', 'solver')}" if bits else "integers",
        "adapted": adapter if trained is None else f"{adapter}, {form.count(trained)} steps",
        "simulated": f"{activation_bits or 'integer'}{'-bit' * bool(activation_bits)} activations",
    }
    steps: list[Step] = []
    before: float | None = None
    for kind, title in KINDS.items():
        after = job.perplexity(kind, adapter)
        if kind == "float" and after is None and job.perplexity("base", adapter) is not None:
            continue  # the model's files hold only integers
        steps.append(Step(title, details[kind], before, after))
        before = after or before
    for target in job.targets:
        drift = job.drift(target, adapter)
        start = job.perplexity(job.compared_with(target, adapter), adapter)
        end = start * (1 + drift) if start and drift is not None else None
        value = "" if drift is None else f"{TIMES} {1 + drift:.4f}"
        steps.append(Step("Exported file", runtime(target), start, end, value))
    return steps


def _draw(steps: list[Step], width: int, missing: str) -> Drawing:
    narrow = is_narrow(width)
    left, right = (118, 80) if narrow else (216, 186)
    values = [v for step in steps for v in (step.before, step.after) if v is not None]
    margin = max((max(values) / min(values)) ** 0.08, 1.005)
    low, high = min(values) / margin, max(values) * margin
    scale = Scale(low, high, left, width - right, logarithmic=True)
    words = ", ".join(
        f"{step.name} {step.after:.3f}" if step.after is not None else f"{step.name} not measured"
        for step in steps
    )
    height = 58 + 46 * len(steps)
    words = f"Perplexity on held-out text: {words}."
    drawing = Drawing(width, height, "Perplexity by stage", words)
    drawing.vertical_grid(scale, 24, height - 30)
    drawing.text(0, 14, "Stage", "hd")
    drawing.text(width if narrow else width - 78, 14, "Perplexity", "hd", "end")
    if not narrow:
        drawing.text(width, 14, "Change", "hd", "end")
    if (start := steps[0].after) is not None:
        drawing.line(scale(start), 24, scale(start), height - 30, "ref")
    for number, step in enumerate(steps):
        y = 40 + 46 * number
        drawing.text(0, y + 10, step.name, "lb")
        drawing.text(0, y + 25, shortened(step.detail, left - 6, 12), "ax")
        _draw_step(drawing, scale, step, y)
        value = step.value or (perplexity(step.after) if step.after is not None else "")
        change, kind = step.change if number else "reference", "nm2" if value else "mut"
        if narrow:
            drawing.text(width, y + 10, value or missing, kind, "end")
            drawing.text(width, y + 25, change if value else "", "ax", "end")
        else:
            drawing.text(width - 78, y + 10, value, "nm2", "end")
            drawing.text(width, y + 10, change or missing, kind, "end")
    return drawing


def _draw_step(drawing: Drawing, scale: Scale, step: Step, y: float) -> None:
    if step.after is None:
        low, high = scale(scale.low), scale(scale.high)
        drawing.rect(low, y, high - low, 22, "hatch", f"{step.name}: not measured", 4)
    elif step.before is None:
        title = f"{step.name}: {step.after:.3f}"
        drawing.rect(scale(step.after) - 2, y, 4, 22, "mark k-float", title, 2)
    else:
        start, end = sorted((scale(step.before), scale(step.after)))
        kind = f"mark {'k-loss' if step.after > step.before else 'k-gain'}"
        title = f"{step.name}: {step.before:.3f} to {step.after:.3f}, {step.change}"
        drawing.line(scale(step.before), y - 24, scale(step.before), y, "conn")
        drawing.rect(start - (end - start < 2), y, max(end - start, 2), 22, kind, title, 2)


def _note(job: Job, adapter: str) -> str:
    for target in job.targets:
        keys = ("sequences", "perplexity", "reference_perplexity")
        numbers = [job.number("parity", target, adapter, key) for key in keys]
        if None not in numbers:
            sequences, value, expected = (number or 0.0 for number in numbers)
            return (
                f"The exported file was run on {form.count(sequences)} "
                f"sequence{'' if sequences == 1 else 's'}: "
                f"{three_decimals(value)}, where {three_decimals(expected)} is expected. "
                "Compare those two with each other, not with the table."
            )
    return ""


def _table(job: Job, adapter: str) -> Table:
    rows: list[dict[str, Cell]] = []
    for kind, title in KINDS.items():
        kl, stderr = (job.path(kind, adapter, key) for key in ("kl", "perplexity_stderr"))
        value = job.shown(three_decimals, *job.path(kind, adapter))
        change = job.change(kind, "float", adapter)
        against = None if change is None else form.tagged(precise_percent(change, True), change)
        row: dict[str, Cell] = {
            "Stage": title,
            "Perplexity": value,
            "Against float": against,
            "KL, mean": job.shown(form.significant, *kl, "mean"),
            "KL, 99.9%": job.shown(form.significant, *kl, "p999"),
            "Same token": job.shown(precise_percent, *job.path(kind, adapter, "top1"), "share"),
            "Standard error": job.shown(lambda v: f"± {three_decimals(v)}", *stderr),
        }
        if kind == "float" and value:
            row |= {"Against float": "reference", "KL, mean": "0", "KL, 99.9%": "0"}
            row["Same token"] = "100%"
        rows.append(row)
    note = Markup(
        '<span class="nm">hatched</span> not measured. Add KL, agreement and standard errors '
        "with {}."
    ).format(job.verb_command("evaluate"))
    sequences = job.setting("data", "evaluation_sequences")
    words = f"the same {sequences} held-out sequences" if sequences else "the same held-out text"
    return Table(
        f"Every stage on {words}. KL divergence (nats) and same likeliest token are against "
        "the float model; the standard error is that of the perplexity.",
        rows,
        marked=(3,) if job.perplexity("simulated", adapter) is not None else (),
        note=note if any(None in row.values() for row in rows) else "",
    )
