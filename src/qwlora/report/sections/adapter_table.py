"""Which adapter helps where? Adapters against texts, a card for each, and a table to sort."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from qwlora.report.drawing import Drawing, Scale
from qwlora.report.evidence import identical_adapters
from qwlora.report.number_format import (
    NOT_MEASURED,
    count,
    fixed,
    listed,
    percent,
    perplexity,
    precise_percent,
    seconds,
    size,
    tagged,
)
from qwlora.report.report_section import Cell, Table, View, section
from qwlora.report.results_view import FILES, Job, code
from qwlora.report.sections.training_course import SMOOTHED, Course, course

MOST_IN_MATRIX = 12
STRENGTHS = (0.1, 0.3)  # relative changes at which the color of a cell becomes stronger


@dataclass(frozen=True)
class MatrixCell:
    """A perplexity and its change against the packed base; `kind` is its color."""

    value: Markup | None
    change: str
    kind: str


@section("adapters", "Adapters", "Which adapter helps where?", position=10, of_job=True)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    if len(job.adapters) < 2:
        return None
    texts = list(job.section("perplexity", "on"))
    columns: list[str | None] = list(texts) or [None]  # a single one if all have the same text
    figures = {name: _figures(job, name) for name in job.adapters}
    rows: list[dict[str, Cell]] = [
        {"Adapter": name, **cells, **_best_and_worst(job, name, texts)}
        for name, cells in figures.items()
    ]
    is_small = len(job.adapters) <= MOST_IN_MATRIX
    return {
        "texts": texts,
        "matrix": {
            name or "none (packed base)": [_cell(job, name, text) for text in columns]
            for name in (None, *job.adapters)
        }
        if is_small
        else {},
        "answer": _answer(job, texts),
        "cards": _cards(job, figures) if is_small else [],
        "table": Table(
            "All adapters. Select a column heading to sort.",
            rows,
            words=("Best text", "Worst text"),
            sortable=True,
        ),
    }


def _figures(job: Job, name: str) -> dict[str, Markup | None]:
    """The figures of an adapter, by label."""
    target = job.targets[0] if job.targets else ""
    same_token = job.worst_proof(name, "top1_agreement", min)
    return {
        "Parameters": job.shown(count, "train", name, "trainable_parameters"),
        "Time per step": job.shown(seconds, "train", name, "step_seconds"),
        "Perplexity, adapted": job.shown(perplexity, "perplexity", "adapted", name),
        "Perplexity, simulated": job.shown(perplexity, "perplexity", "simulated", name),
        "Same token": job.shown(precise_percent, *same_token),
        "Worst layer, steps": job.shown(fixed, *job.worst_proof(name, "worst_layer_steps")),
        FILES.get(target, "Exported file"): job.shown(size, "export", target, name, "bytes"),
    }


def _value(job: Job, name: str | None, text: str | None) -> tuple[float | None, tuple[str, ...]]:
    """The perplexity of an adapter, or without one of the packed base, on a text; and its place."""
    kind = ("base",) if name is None else ("adapted", name)
    path = ("perplexity", "on", text, *kind) if text else ("perplexity", *kind)
    return job.number(*path), path


def _cell(job: Job, name: str | None, text: str | None) -> MatrixCell:
    (value, path), (base, _) = _value(job, name, text), _value(job, None, text)
    if value is None:
        return MatrixCell(None, "", "nmc")
    shown = tagged(perplexity(value), value, path)
    if name is None or not base:
        return MatrixCell(shown, "reference", "z")
    change = value / base - 1
    strength = 1 + sum(abs(change) >= limit for limit in STRENGTHS)
    kind = "z" if abs(change) < 0.0005 else f"{'g' if change < 0 else 'l'}{strength}"
    return MatrixCell(shown, percent(change, sign=True), kind)


def _answer(job: Job, texts: list[str]) -> Markup:
    if not texts:
        return Markup(
            "<b>All adapters were tested on one text.</b> Each adapter needs a text of its own "
            "before this says which helps where: set {}."
        ).format(code("adapters[].data"))
    best = {}
    for text in texts:
        values = {n: v for n in job.adapters if (v := _value(job, n, text)[0]) is not None}
        if values:
            best[text] = min(values, key=lambda n: values[n])
    others = [
        f"{name} on the text of {text}" for text, name in best.items() if job.text_of(name) != text
    ]
    if len(best) == len(texts) and not others:
        return Markup("<b>Each adapter is the best on its own text.</b>")
    return Markup("<b>Not every adapter is the best on its own text: {} is better.</b>").format(
        listed(others)
    )


def _cards(job: Job, figures: dict[str, dict[str, Markup | None]]) -> list[dict[str, object]]:
    """Name, badge, plot and facts of each adapter."""
    same = {name: group for group in identical_adapters(job) for name in group}
    courses = {name: run for name in figures if (run := course(job, name)) is not None}
    return [
        {
            "name": name,
            "badge": f"same as {listed([n for n in same[name] if n != name])}"
            if name in same
            else "",
            "plot": _sparkline(name, courses) if name in courses else "",
            "facts": {label: value or NOT_MEASURED for label, value in cells.items()},
        }
        for name, cells in figures.items()
    ]


def _sparkline(name: str, courses: dict[str, Course]) -> Markup:
    """The mean loss; all cards share one axis."""
    means = {name: run.means for name, run in courses.items()}
    values = [value for row in means.values() for value in row]
    x = Scale(1, max(len(row) for row in means.values()), 2, 250)
    y = Scale(min(values), max(values) if max(values) > min(values) else min(values) + 1, 42, 6)
    row = means[name]
    words = f"Training loss, mean of {SMOOTHED} steps: {row[0]:.3f} to {row[-1]:.3f}."
    drawing = Drawing(252, 48, f"{name}: training loss", words)
    points = [(x(n), y(value)) for n, value in enumerate(row, 1)]
    if len(points) > 1:
        drawing.polyline(points[:: max(1, len(points) // 500)], "mark l-train")
    drawing.circle(*points[-1], 3, "mark d-gain")
    return drawing.svg("plot sp")


def _best_and_worst(job: Job, name: str, texts: list[str]) -> dict[str, str | None]:
    """The texts that the adapter improves most and least, against the packed base."""
    changes = {}
    for text in texts:
        value, base = _value(job, name, text)[0], _value(job, None, text)[0]
        if value and base:
            changes[text] = value / base
    if not texts:
        return {}
    return {
        "Best text": min(changes, key=lambda text: changes[text], default=None),
        "Worst text": max(changes, key=lambda text: changes[text], default=None),
    }
