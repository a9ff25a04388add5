"""Which adapter helps where? Adapters against texts, and a table to sort."""

from __future__ import annotations

from markupsafe import Markup

from qwlora.errors import size
from qwlora.report import number_format as form
from qwlora.report.number_format import percent, perplexity, precise_percent
from qwlora.report.results_view import FILES, Job
from qwlora.report.sections import Cell, Table, View, section

MOST_IN_MATRIX = 12
STRENGTHS = (0.1, 0.3)  # relative changes at which the color of a cell becomes stronger


@section("adapters", "Adapters", "Which adapter helps where?", position=10, of_job=True)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    if len(job.adapters) < 2:
        return None
    # There is a single column if all have the same text, or each was measured on its own only.
    texts, is_own = list(job.section("perplexity", "on")), False
    pairs = [(name, text) for name in job.adapters for text in texts if job.text_of(name) != text]
    if texts and all(job.number(*_path(name, text)) is None for name, text in pairs):
        texts, is_own = [], True
    only = "Own text" if is_own else "Shared text"
    columns = {f"Text of {text}": text for text in texts} or {only: ""}
    matrix: list[dict[str, Cell]] = [
        {
            "Adapter": name or "none (packed base)",
            **{title: _cell(job, name, text) for title, text in columns.items()},
        }
        for name in (*[""] * (not is_own), *job.adapters)
    ]
    rows = [_row(job, name, texts) for name in job.adapters]
    caption = "All adapters. Select a column heading to sort."
    return {
        "texts": texts,
        "is_own": is_own,
        "matrix": Table("Perplexity, and change against the packed base.", matrix),
        "has_matrix": len(job.adapters) <= MOST_IN_MATRIX,
        "better": _better_than_own(job, texts),
        "table": Table(caption, rows, words=("Best text", "Worst text"), sortable=True),
    }


def _row(job: Job, name: str, texts: list[str]) -> dict[str, Cell]:
    target = job.targets[0] if job.targets else ""
    same_token = job.worst_proof(name, "top1_agreement", min)
    worst_layer = job.worst_proof(name, "worst_layer_steps")
    link = Markup('<a href="#d-{}">{}</a>').format(job.adapters.index(name) + 1, name)
    origin = job.origin(name)
    row: dict[str, Cell] = {
        "Adapter": link if origin else name,
        "Steps": job.shown(form.count, "train", name, "steps") if origin == "trained" else origin,
        "Parameters": job.shown(form.count, "train", name, "trainable_parameters"),
        "Time per step": job.shown(form.seconds, "train", name, "step_seconds"),
        "Perplexity, adapted": job.shown(perplexity, "perplexity", "adapted", name),
        **(
            {"Perplexity, simulated": job.shown(perplexity, "perplexity", "simulated", name)}
            if job.is_simulated
            else {}
        ),
        "Same token": job.shown(precise_percent, *same_token),
        **(
            {"Worst layer, steps": job.shown(form.fixed, *worst_layer)}
            if job.is_simulated  # only such files have layers to compare
            else {}
        ),
        FILES.get(target, "Exported file"): job.shown(size, "export", target, name, "bytes"),
    }
    values = {
        text: (job.number(*_path(name, text)), job.number(*_path("", text))) for text in texts
    }
    changes = {text: value / base for text, (value, base) in values.items() if value and base}
    if texts:
        row["Best text"] = min(changes, key=lambda text: changes[text], default=None)
        row["Worst text"] = max(changes, key=lambda text: changes[text], default=None)
    return row


def _path(name: str, text: str) -> tuple[str, ...]:
    """The place of the perplexity of an adapter, or without one of the packed base, on a text."""
    kind = ("adapted", name) if name else ("base",)
    return ("perplexity", "on", text, *kind) if text else ("perplexity", *kind)


def _cell(job: Job, name: str, text: str) -> Cell:
    of_base = _path("", text) if text else job.path("base", name)
    value, base = job.number(*_path(name, text)), job.number(*of_base)
    shown = job.shown(perplexity, *_path(name, text))
    if value is None:
        return None
    words, kind = "reference", "z"
    if name and base:
        change = value / base - 1
        words = percent(change, sign=True)
        if words != percent(0):
            strength = 1 + sum(abs(change) >= limit for limit in STRENGTHS)
            kind = f"{'g' if change < 0 else 'l'}{strength}"
    return Markup('<span class="c {}">{}<small>{}</small></span>').format(kind, shown, words)


def _better_than_own(job: Job, texts: list[str]) -> list[str] | None:
    """Adapters that are the best on the text of another; None if a text was not measured."""
    better = []
    for text in texts:
        numbers = {name: job.number(*_path(name, text)) for name in job.adapters}
        values = {name: number for name, number in numbers.items() if number is not None}
        if not values:
            return None
        best = min(values, key=lambda n: values[n])
        if job.text_of(best) != text:
            better.append(f"{best} on the text of {text}")
    return better
