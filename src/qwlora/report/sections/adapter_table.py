"""Which adapter helps where? Adapters against texts, a card for each, and a table to sort."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from qwlora.report.checks import identical_adapters
from qwlora.report.drawing import Drawing, Scale
from qwlora.report.number_format import (
    count,
    fixed,
    listed,
    percent,
    perplexity,
    precise_percent,
    size,
)
from qwlora.report.report_table import Table
from qwlora.report.results_view import FILES, NOT_MEASURED, Job, code, tagged
from qwlora.report.section import Section, View
from qwlora.report.sections.training_course import course, smoothed

MOST_IN_MATRIX = 12


@dataclass(frozen=True)
class Cell:
    """A cell of the matrix: `kind` is its color, None for what was not measured."""

    value: Markup | None
    change: str
    kind: str


@dataclass(frozen=True)
class Card:
    """One adapter."""

    name: str
    badge: str
    plot: Markup | None
    facts: list[tuple[str, Markup]]


def view(job: Job, adapter: str | None) -> View | None:
    """What the template draws."""
    if len(job.adapters) < 2:
        return None
    same = {
        name: [n for n in group if n != name] for group in identical_adapters(job) for name in group
    }
    texts = list(job.section("perplexity", "on"))
    is_small = len(job.adapters) <= MOST_IN_MATRIX
    return {
        "texts": texts,
        "matrix": _matrix(job, texts) if is_small else None,
        "answer": _answer(job, texts),
        "cards": [_card(job, name, same.get(name, [])) for name in job.adapters]
        if is_small
        else [],
        "table": _table(job, texts),
    }


def _matrix(job: Job, texts: list[str]) -> list[tuple[str, list[Cell]]]:
    """Rows of adapters; a single column if all have the same text."""
    columns: list[str | None] = list(texts) or [None]
    rows = [("none (packed base)", [_cell(job, None, text) for text in columns])]
    return [*rows, *((name, [_cell(job, name, text) for text in columns]) for name in job.adapters)]


def _value(job: Job, name: str | None, text: str | None) -> tuple[float | None, tuple[str, ...]]:
    kind = ("base",) if name is None else ("adapted", name)
    path = ("perplexity", "on", text, *kind) if text else ("perplexity", *kind)
    value = job.number(*path)
    if value is None and name is not None and text is not None:
        path = ("perplexity", "matrix", name, text)
        value = job.number(*path)
    return value, path


def _cell(job: Job, name: str | None, text: str | None) -> Cell:
    value, path = _value(job, name, text)
    base, _ = _value(job, None, text)
    if value is None:
        return Cell(None, "", "nmc")
    shown = tagged(perplexity(value), value, path)
    if name is None or not base:
        return Cell(shown, "reference", "z")
    change = value / base - 1
    strength = 1 if abs(change) < 0.1 else 2 if abs(change) < 0.3 else 3
    kind = "z" if abs(change) < 0.0005 else f"{'g' if change < 0 else 'l'}{strength}"
    return Cell(shown, percent(change, sign=True), kind)


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
    own = [text for text, name in best.items() if job.text_of(name) == text]
    if len(own) == len(texts):
        return Markup("<b>Each adapter is the best on its own text.</b>")
    others = [f"{name} on the text of {text}" for text, name in best.items() if text not in own]
    return Markup("<b>Not every adapter is the best on its own text: {} is better.</b>").format(
        listed(others)
    )


def _card(job: Job, name: str, same: list[str]) -> Card:
    target = job.targets[0] if job.targets else ""
    entries = (
        ("Trained parameters", ("train", name, "trainable_parameters"), count),
        ("Perplexity, adapted", ("perplexity", "adapted", name), perplexity),
        ("Perplexity, simulated", ("perplexity", "simulated", name), perplexity),
        (
            "Same likeliest token",
            job.worst_proof(name, "top1_agreement", is_least=True)[1],
            precise_percent,
        ),
        ("Worst layer, steps", job.worst_proof(name, "worst_layer_steps")[1], fixed),
        (FILES.get(target, "Exported file"), ("export", target, name, "bytes"), size),
    )
    facts = []
    for label, path, write in entries:
        value = job.number(*path)
        shown = NOT_MEASURED if value is None else tagged(write(value), value, path)
        facts.append((label, shown))
    return Card(name, f"same as {listed(same)}" if same else "", _sparkline(job, name), facts)


def _sparkline(job: Job, name: str) -> Markup | None:
    """The mean loss; all cards share one axis."""
    courses = {n: found for n in job.adapters if (found := course(job, n)) is not None}
    own = courses.get(name)
    if own is None:
        return None
    means = {n: smoothed(found.losses) for n, found in courses.items()}
    values = [value for row in means.values() for value in row]
    x = Scale(1, max(len(row) for row in means.values()), 2, 250)
    y = Scale(min(values), max(values) if max(values) > min(values) else min(values) + 1, 42, 6)
    row = means[name]
    words = f"Training loss, mean of 8 steps: {row[0]:.3f} to {row[-1]:.3f}."
    drawing = Drawing(252, 48, f"{name}: training loss", words)
    points = [(x(n), y(value)) for n, value in enumerate(row, 1)]
    if len(points) > 1:
        drawing.polyline(points[:: max(1, len(points) // 500)], "mark l-train")
    drawing.circle(*points[-1], 3, "mark d-gain")
    return drawing.svg("plot sp")


def _table(job: Job, texts: list[str]) -> Table:
    target = job.targets[0] if job.targets else ""
    columns = (
        ("Parameters", lambda n: ("train", n, "trainable_parameters"), count),
        ("Time per step, s", lambda n: ("train", n, "step_seconds"), lambda v: fixed(v, 2)),
        ("Perplexity, adapted", lambda n: ("perplexity", "adapted", n), lambda v: fixed(v, 3)),
        ("Perplexity, simulated", lambda n: ("perplexity", "simulated", n), lambda v: fixed(v, 3)),
        (
            "Worst layer, steps",
            lambda n: job.worst_proof(n, "worst_layer_steps")[1],
            fixed,
        ),
        ("File, MB", lambda n: ("export", target, n, "bytes"), lambda v: fixed(v / 1e6, 2)),
    )
    rows: list[list[str | Markup | None]] = []
    for name in job.adapters:
        row: list[str | Markup | None] = [name]
        for _, path, write in columns:
            value = job.number(*path(name))
            row.append(None if value is None else tagged(write(value), value, path(name)))
        if texts:
            row += _best_and_worst(job, name, texts)
        rows.append(row)
    headings = ["Adapter", *(title for title, _, _ in columns)]
    return Table(
        "All adapters. Select a column heading to sort.",
        [*headings, "Best text", "Worst text"] if texts else headings,
        rows,
        left=(len(headings), len(headings) + 1) if texts else (),
        sortable=True,
    )


def _best_and_worst(job: Job, name: str, texts: list[str]) -> list[str | None]:
    """The texts that the adapter improves most and least, against the packed base."""
    changes = {}
    for text in texts:
        value, base = _value(job, name, text)[0], _value(job, None, text)[0]
        if value and base:
            changes[text] = math.log(value / base)
    if not changes:
        return [None, None]
    return [min(changes, key=lambda t: changes[t]), max(changes, key=lambda t: changes[t])]


SECTION = Section("adapters", "Adapters", "Which adapter helps where?", "adapter_table.html", view)
