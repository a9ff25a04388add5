"""What did each stage cost? A waterfall of perplexities on a logarithmic axis, and its table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from qwlora.report.drawing import Drawing, Scale, figure, shortened, ticks
from qwlora.report.number_format import (
    TIMES,
    count,
    fixed,
    percent,
    perplexity,
    precise_percent,
    significant,
)
from qwlora.report.report_table import Table
from qwlora.report.results_view import Job, code, finite, runtime, tagged, valued
from qwlora.report.section import Section, View

KINDS = {
    "float": "Float model",
    "base": "Packed base",
    "adapted": "With adapter",
    "simulated": "Simulated",
}


@dataclass(frozen=True)
class Row:
    """A bar from `before` to `after`; without `after` the stage was not measured.

    Args:
        small: below the name.
    """

    name: str
    small: str
    before: float | None
    after: float | None
    change: float | None = None
    shown: str = ""


def view(job: Job, adapter: str | None) -> View | None:
    """What the template draws."""
    name = adapter or job.adapters[0]
    rows = waterfall(job, name)
    if sum(row.after is not None for row in rows) < 2:
        return None
    missing = "waiting" if job.state == "running" else "not measured"
    return {
        "figure": figure(lambda width: _draw(rows, width, missing)),
        "answer": _answer(job, name),
        "magnified": _magnified(job, name),
        "note": _note(job, name),
        "table": _table(job, name),
    }


def waterfall(job: Job, adapter: str) -> list[Row]:
    """One row for each stage."""
    rows: list[Row] = []
    before: float | None = None
    for kind, title in KINDS.items():
        after = job.perplexity(kind, adapter)
        if kind == "float" and after is None and job.perplexity("base", adapter) is not None:
            continue  # the model's files hold only integers
        change = after / before - 1 if after is not None and before is not None else None
        rows.append(Row(title, _small(job, adapter, kind), before, after, change))
        before = after if after is not None else before
    for target in job.targets:
        drift = None if (target, adapter) in job.stale else job.drift(target, adapter)
        start = job.perplexity(job.compared_with(target, adapter), adapter)
        own = job.number("perplexity", "exported", target, adapter)
        end = (
            own if own is not None else start * (1 + drift) if start and drift is not None else None
        )
        shown = "" if own is not None or drift is None else f"{TIMES} {1 + drift:.4f}"
        rows.append(Row("Exported file", runtime(target), start, end, drift, shown))
    return rows


def _small(job: Job, adapter: str, kind: str) -> str:
    if kind == "float":
        return "as loaded"
    if kind == "base":
        weights = job.setting("base", "weights")
        bits = weights.get("bitwidth") if isinstance(weights, dict) else None
        solver = job.setting("base", "solver")
        return f"{bits}-bit, {solver}" if bits else "integers"
    if kind == "adapted":
        steps = job.number("train", adapter, "steps")
        return f"{adapter}, {count(steps)} steps" if steps is not None else adapter
    bits = job.setting("simulation", "activation_bitwidth")
    return f"{bits}-bit activations" if bits else "integer activations"


def _draw(rows: list[Row], width: int, missing: str) -> Drawing:
    narrow = width < 500
    left, right = (118, 80) if narrow else (216, 186)
    values = [v for row in rows for v in (row.before, row.after) if v is not None]
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.08, 1.005)
    scale = Scale(low / margin, high * margin, left, width - right, logarithmic=True)
    height = 58 + 46 * len(rows)
    drawing = Drawing(width, height, "Perplexity by stage", _description(rows))
    for tick in ticks(scale.low, scale.high, 4 if narrow else 8):
        drawing.line(scale(tick), 24, scale(tick), height - 30)
        drawing.text(scale(tick), height - 12, significant(tick), "ax", "middle")
    drawing.text(0, 14, "Stage", "hd")
    if narrow:
        drawing.text(width, 14, "Perplexity", "hd", "end")
    else:
        drawing.text(width - 78, 14, "Perplexity", "hd", "end")
        drawing.text(width, 14, "Change", "hd", "end")
    start = rows[0].after
    if start is not None:
        drawing.line(scale(start), 24, scale(start), height - 30, "ref")
    for number, row in enumerate(rows):
        y = 40 + 46 * number
        drawing.text(0, y + 10, row.name, "lb")
        drawing.text(0, y + 25, shortened(row.small, left - 6, 12), "ax")
        _bar(drawing, scale, row, y, number == 0)
        value = row.shown or (perplexity(row.after) if row.after is not None else "")
        change = "reference" if number == 0 else _change(row)
        if narrow:
            drawing.text(width, y + 10, value or missing, "nm2" if value else "mut", "end")
            drawing.text(width, y + 25, change if value else "", "ax", "end")
        else:
            drawing.text(width - 78, y + 10, value, "nm2", "end")
            drawing.text(width, y + 10, change or missing, "nm2" if value else "mut", "end")
    return drawing


def _change(row: Row) -> str:
    if row.change is None:
        return ""
    small = abs(row.change) < 0.01
    return precise_percent(row.change, True) if small else percent(row.change, True)


def _bar(drawing: Drawing, scale: Scale, row: Row, y: float, first: bool) -> None:
    if row.after is None:
        low, high = scale(scale.low), scale(scale.high)
        drawing.rect(low, y, high - low, 22, "hatch", f"{row.name}: not measured", 4)
        return
    if first or row.before is None:
        drawing.rect(
            scale(row.after) - 2, y, 4, 22, "mark k-float", f"{row.name}: {row.after:.3f}", 2
        )
        return
    one, two = sorted((scale(row.before), scale(row.after)))
    kind = "k-loss" if row.after > row.before else "k-gain"
    title = f"{row.name}: {row.before:.3f} to {row.after:.3f}, {_change(row)}"
    drawing.line(scale(row.before), y - 24, scale(row.before), y, "conn")
    drawing.rect(one - (two - one < 2), y, max(two - one, 2), 22, f"mark {kind}", title, 2)


def _description(rows: list[Row]) -> str:
    found = [
        f"{row.name} {row.after:.3f}" if row.after is not None else f"{row.name} not measured"
        for row in rows
    ]
    return f"Perplexity on held-out text: {', '.join(found)}."


def _answer(job: Job, adapter: str) -> Markup:
    packing, training = job.change("base", "float", adapter), job.change("adapted", "base", adapter)
    reference, base, after = (
        job.perplexity(kind, adapter) for kind in ("float", "base", "adapted")
    )
    if packing is None:
        if training is None:
            return Markup("<b>The packed base is measured; nothing after it is yet.</b>")
        direction = "better" if training < 0 else "worse"
        return Markup(
            "<b>The adapter made the packed base {} {}.</b> The model's files hold only integers, "
            "so there is no float model to compare with."
        ).format(percent(abs(training)), direction)
    cost = (
        f"Packing cost {percent(packing)}"
        if packing > 0
        else f"Packing cost nothing: perplexity is {percent(-packing)} better"
    )
    if after is None or base is None or reference is None:
        return Markup("<b>{}.</b>").format(cost)
    if packing <= 0 or after >= base:
        word = "better" if after < base else "worse"
        return Markup("<b>{}; the adapter made it {} {} than the packed base.</b>").format(
            cost, percent(abs(after / base - 1)), word
        )
    share = math.log(base / after) / math.log(base / reference)
    if share > 10:
        return Markup("<b>{}; the adapter then made the model {} better.</b>").format(
            cost, percent(1 - after / base)
        )
    more = (
        " More than 100% means that it repaired the damage and then learned the text."
        if share > 1
        else ""
    )
    return Markup("<b>{}; the adapter won back {:.0%} of it.</b>{}").format(cost, share, more)


def _magnified(job: Job, adapter: str) -> Markup | None:
    """Bullets of the steps that are too small for the waterfall."""
    rows: list[tuple[str, float, float | None, str]] = []
    simulation = job.change("simulated", "adapted", adapter)
    if simulation is not None:
        rows.append(("Simulation, of the adapter", simulation, None, "k-neu"))
    for target in job.targets:
        drift = None if (target, adapter) in job.stale else job.drift(target, adapter)
        if drift is not None:
            row = job.perplexity_row(target, adapter)
            allowed = None if row is None else finite(row.limit)
            kind = "k-loss" if row is not None and not row.passed else "k-gain"
            of = "simulation" if job.compared_with(target, adapter) == "simulated" else "adapter"
            rows.append((f"{runtime(target)}, of the {of}", drift, allowed, kind))
    return figure(lambda width: _bullets(rows, width)) if rows else None


def _bullets(rows: list[tuple[str, float, float | None, str]], width: int) -> Drawing:
    narrow = width < 500
    left, right = (0, 0) if narrow else (250, 150)
    step = 50 if narrow else 34
    most = max(abs(value) for _, value, _, _ in rows)
    most = 1.25 * max([most, *(limit for _, _, limit, _ in rows if limit is not None), 1e-6])
    scale = Scale(0, most, left, width - right)
    words = ", ".join(f"{name} {precise_percent(value, True)}" for name, value, _, _ in rows)
    drawing = Drawing(width, 22 + step * len(rows), "The last steps, magnified", f"{words}.")
    for number, (name, value, limit, kind) in enumerate(rows):
        y = 24 + step * number + (16 if narrow else 0)
        drawing.text(0, y - 7 if narrow else y + 10, name, "lb")
        drawing.rect(left, y, width - right - left, 12, "track", "", 2)
        title = f"{name}: {precise_percent(value, True)}"
        drawing.rect(left, y, scale(abs(value)) - left, 12, f"mark {kind}", title, 2)
        if limit is not None:
            drawing.line(scale(limit), y - (2 if narrow else 5), scale(limit), y + 17, "limit")
        shown = precise_percent(value, True)
        if narrow and limit is not None:
            shown = f"{shown}, limit {precise_percent(limit)}"
        elif limit is not None:
            drawing.text(scale(limit), y - 8, f"limit {precise_percent(limit)}", "ax", "middle")
        drawing.text(width, y - 7 if narrow else y + 11, shown, "nm2", "end")
    return drawing


def _note(job: Job, adapter: str) -> str:
    for target in job.targets:
        sequences = job.number("parity", target, adapter, "sequences")
        found = job.number("parity", target, adapter, "perplexity")
        expected = job.expected(target, adapter)
        if None not in (sequences, found, expected):
            return (
                f"The exported file was run on {count(sequences or 0)} "
                f"sequence{'' if sequences == 1 else 's'}: "
                f"{fixed(found or 0, 3)}, where {fixed(expected or 0, 3)} is expected. "
                "Compare those two with each other, not with the table."
            )
    return ""


def _table(job: Job, adapter: str) -> Table:
    rows: list[list[str | Markup | None]] = []
    for kind, title in KINDS.items():
        value = job.perplexity(kind, adapter)
        path = job.path(kind, adapter)
        change = job.change(kind, "float", adapter)
        stderr = job.number(*job.path(kind, adapter, "perplexity_stderr"))
        if kind == "float":
            kl: list[str | Markup | None] = ["0", "0", "100%"] if value else [None, None, None]
        else:
            kl = [
                _cell(job, job.path(kind, adapter, "kl"), "mean"),
                _cell(job, job.path(kind, adapter, "kl"), "p999"),
                _cell(job, job.path(kind, adapter, "top1"), "share", as_percent=True),
            ]
        against: str | Markup | None = None
        if kind == "float":
            against = "reference" if value else None
        elif change is not None:
            against = valued(precise_percent(change, True), change)
        rows.append(
            [
                title,
                tagged(fixed(value, 3), value, path) if value is not None else None,
                against,
                *kl,
                tagged(
                    f"± {fixed(stderr, 3)}", stderr, job.path(kind, adapter, "perplexity_stderr")
                )
                if stderr is not None
                else None,
            ]
        )
    missing = any(cell is None for row in rows for cell in row)
    note = (
        Markup(
            '<span class="nm">hatched</span> not measured. Add KL, agreement and standard errors '
            "with {}."
        ).format(code(job.verb_command("evaluate")))
        if missing
        else ""
    )
    sequences = job.setting("data", "evaluation_sequences")
    words = f"the same {sequences} held-out sequences" if sequences else "the same held-out text"
    return Table(
        f"Every stage on {words}. KL divergence (nats) and same likeliest token are against "
        "the float model; the standard error is that of the perplexity.",
        (
            "Stage",
            "Perplexity",
            "Against float",
            "KL, mean",
            "KL, 99.9%",
            "Same token",
            "Standard error",
        ),
        rows,
        marked=(3,) if job.perplexity("simulated", adapter) is not None else (),
        note=note,
    )


def _cell(job: Job, path: tuple[str, ...], key: str, as_percent: bool = False) -> Markup | None:
    value = job.number(*path, key)
    if value is None:
        return None
    text = precise_percent(value) if as_percent else significant(value)
    return tagged(text, value, (*path, key))


SECTION = Section(
    "stages",
    "Cost by stage",
    "What did each stage cost?",
    "stage_losses.html",
    view,
    of_job=False,
    of_adapter=True,
)
