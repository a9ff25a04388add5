"""The page that compares jobs: columns are jobs, and only the recipe's lines that differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from qwlora.report import size_quality
from qwlora.report.drawing import Drawing, Scale, figure, shortened, ticks
from qwlora.report.number_format import (
    count,
    fixed,
    perplexity,
    precise_percent,
    seconds,
    significant,
    size,
)
from qwlora.report.report_table import Table
from qwlora.report.results_view import Job, finite, runtime, tagged, without_folders
from qwlora.report.sections.stage_costs import KINDS
from qwlora.report.sections.training_course import course, smoothed
from qwlora.report.verdict import verdict

Row = list[str | Markup | None]


def comparison(jobs: Sequence[Job]) -> dict[str, Any]:
    """What the template draws."""
    names = _names(jobs)
    verdicts = [verdict(job) for job in jobs]
    return {
        "title": f"{' and '.join(names[:2])}{' …' if len(names) > 2 else ''} · QWLoRA comparison",
        "jobs": list(zip(names, jobs, verdicts, strict=True)),
        "answer": _answer(names, jobs),
        "stages": _stage_table(names, jobs),
        "stage_figure": _stage_figure(names, jobs),
        "size_quality": _size_quality(names, jobs),
        "training": _training_figure(names, jobs),
        "parity": _parity_table(names, jobs),
        "cost": _cost_table(names, jobs),
        "recipe": _recipe_table(names, jobs),
    }


def _names(jobs: Sequence[Job]) -> list[str]:
    """Names of the jobs, with their folders if they have the same."""
    titles = [job.title for job in jobs]
    names = [
        title if titles.count(title) == 1 else f"{title} ({job.name})"
        for title, job in zip(titles, jobs, strict=True)
    ]
    return [f"{n}. {name}" if names.count(name) > 1 else name for n, name in enumerate(names, 1)]


def _series(names: list[str], jobs: Sequence[Job]) -> list[tuple[str, Job, str]]:
    """Every adapter of every job, with a name for it."""
    single = all(len(job.adapters) == 1 for job in jobs)
    return [
        (name if single else f"{name}, {adapter}", job, adapter)
        for name, job in zip(names, jobs, strict=True)
        for adapter in job.adapters
    ]


def _final(job: Job, adapter: str) -> float | None:
    kind = job.best_kind(adapter)
    return job.perplexity(kind, adapter) if kind else None


def _answer(names: list[str], jobs: Sequence[Job]) -> Markup:
    values = {
        name: value
        for name, job, adapter in _series(names, jobs)
        if (value := _final(job, adapter)) is not None
    }
    if len(values) < 2:
        return Markup("<b>Fewer than two of these jobs were evaluated.</b>")
    if not _one_text(names, jobs):
        return Markup(
            "<b>They were tested on different texts, so their perplexities cannot be compared.</b>"
        )
    best, worst = min(values, key=lambda n: values[n]), max(values, key=lambda n: values[n])
    return Markup("<b>{} has the lowest perplexity, {}; {} has the highest, {}.</b>").format(
        best, perplexity(values[best]), worst, perplexity(values[worst])
    )


def _one_text(names: list[str], jobs: Sequence[Job]) -> bool:
    return len({_text(job, adapter) for _, job, adapter in _series(names, jobs)}) == 1


def _text(job: Job, adapter: str) -> str:
    """The source of an adapter's text."""
    listed = job.setting("adapters")
    found = [a for a in listed if a.get("name") == adapter] if isinstance(listed, list) else []
    own = (found[0].get("data") or {}).get("source") if found else None
    return str(own or job.setting("data", "source"))


def _stage_table(names: list[str], jobs: Sequence[Job]) -> Table:
    series = _series(names, jobs)
    rows: list[Row] = []
    for kind, title in KINDS.items():
        row: Row = [title]
        for _, job, adapter in series:
            value = job.perplexity(kind, adapter)
            path = job.path(kind, adapter)
            row.append(None if value is None else tagged(fixed(value, 3), value, path))
        rows.append(row)
    rows.append(
        [
            "KL to float, simulated",
            *(
                _number(job, (*job.path("simulated", a, "kl"), "mean"), significant)
                for _, job, a in series
            ),
        ]
    )
    return Table(
        "Perplexity on held-out text, by stage", ("Stage", *(n for n, _, _ in series)), rows
    )


def _number(job: Job, path: tuple[str, ...], write: Callable[[float], str]) -> Markup | None:
    value = job.number(*path)
    return None if value is None else tagged(write(value), value, path)


def _stage_figure(names: list[str], jobs: Sequence[Job]) -> Markup | None:
    rows = [
        (name, [(kind, job.perplexity(kind, adapter)) for kind in KINDS])
        for name, job, adapter in _series(names, jobs)
    ]
    values = [v for _, found in rows for _, v in found if v is not None]
    return figure(lambda width: _draw_stages(rows, values, width)) if values else None


def _draw_stages(
    rows: list[tuple[str, list[tuple[str, float | None]]]], values: list[float], width: int
) -> Drawing:
    narrow = width < 500
    left, step = (0 if narrow else 180), 56 if narrow else 44
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.06, 1.005)
    scale = Scale(low / margin, high * margin, left + 8, width - 20, logarithmic=True)
    height = 44 + step * len(rows)
    words = "; ".join(
        f"{name}: " + ", ".join(f"{KINDS[k]} {v:.3f}" for k, v in found if v is not None)
        for name, found in rows
    )
    drawing = Drawing(width, height, "Perplexity by stage and job", f"{words}.")
    for tick in ticks(scale.low, scale.high, 4 if narrow else 8):
        drawing.line(scale(tick), 8, scale(tick), height - 28)
        drawing.text(scale(tick), height - 10, significant(tick), "ax", "middle")
    kinds = {"float": "k-float", "base": "d-loss", "adapted": "d-gain", "simulated": "d-held2"}
    for number, (name, found) in enumerate(rows):
        y = 28 + step * number + (14 if narrow else 0)
        drawing.text(0, y - 12 if narrow else y + 5, shortened(name, 170), "lb")
        known = [(kind, value) for kind, value in found if value is not None]
        if known:
            ends = [scale(v) for _, v in known]
            drawing.line(min(ends), y, max(ends), y, "conn")
        for kind, value in known:
            drawing.circle(scale(value), y, 5, f"mark {kinds[kind]}", f"{KINDS[kind]}: {value:.3f}")
    return drawing


def _size_quality(names: list[str], jobs: Sequence[Job]) -> dict[str, str | Markup] | None:
    """The plot of jobs with bases of different sizes that were tested on the same text."""
    points = [
        size_quality.Point(name, bits, value)
        for name, job, adapter in _series(names, jobs)
        if (bits := job.number("base", "bits_per_weight")) is not None
        and (value := _final(job, adapter)) is not None
    ]
    if len({p.bits for p in points}) < 2 or not _one_text(names, jobs):
        return None
    return {
        "answer": size_quality.answer(points),
        "figure": figure(lambda width: size_quality.draw(points, width)),
    }


def _training_figure(names: list[str], jobs: Sequence[Job]) -> Markup | None:
    found = [
        (name, smoothed(c.losses))
        for name, job, adapter in _series(names, jobs)
        if (c := course(job, adapter)) is not None
    ]
    return figure(lambda width: _draw_training(found[:8], width)) if found else None


def _draw_training(found: list[tuple[str, list[float]]], width: int) -> Drawing:
    narrow = width < 500
    left, right = 40, 16 if narrow else 150
    values = [v for _, means in found for v in means]
    margin = 0.06 * ((max(values) - min(values)) or 1)
    x = Scale(1, max(max(len(means) for _, means in found), 2), left, width - right)
    y = Scale(min(values) - margin, max(values) + margin, 240, 16)
    words = "; ".join(f"{name}: {m[0]:.3f} to {m[-1]:.3f} in {len(m)} steps" for name, m in found)
    drawing = Drawing(width, 268, "Training loss, mean of 8 steps", f"{words}.")
    for tick in ticks(y.low, y.high, 5):
        drawing.line(left, y(tick), width - right, y(tick))
        drawing.text(left - 6, y(tick) + 4, significant(tick), "ax", "end")
    drawing.text(width - right, 260, f"step {count(x.high)}", "ax", "end")
    taken: list[float] = []
    for number, (name, means) in enumerate(found):
        points = [(x(n), y(v)) for n, v in enumerate(means, 1)]
        drawing.polyline(points[:: max(1, len(points) // 800)], f"mark s{number}")
        drawing.circle(*points[-1], 3, f"mark c{number}", f"{name}: {means[-1]:.3f}")
        place = points[-1][1] + 4
        while any(abs(place - other) < 14 for other in taken):
            place += 14
        taken.append(place)
        at = points[-1][0] + (-8 if narrow else 8)
        drawing.text(
            at, place, shortened(name, 138, 12), f"t{number}", "end" if narrow else "start"
        )
    return drawing


def _parity_table(names: list[str], jobs: Sequence[Job]) -> Table | None:
    rows: list[Row] = []
    for name, job, adapter in _series(names, jobs):
        for target in job.targets:
            place = ("parity", target, adapter)
            drift = job.drift(target, adapter)
            stale = (target, adapter) in job.stale
            passed = None if stale else job.get(*place, "passed")
            rows.append(
                [
                    f"{name}: {runtime(target)}",
                    None if stale or drift is None else precise_percent(abs(drift)),
                    None if stale else _number(job, (*place, "top1_agreement"), precise_percent),
                    None
                    if stale
                    else _number(job, (*place, "floor_top1_agreement"), precise_percent),
                    None if stale else _number(job, (*place, "worst_layer_steps"), fixed),
                    None if passed is None else "passed" if passed else "failed",
                ]
            )
    columns = (
        "Files",
        "Perplexity off by",
        "Same token",
        "Noise floor",
        "Worst layer, steps",
        "Check",
    )
    return (
        Table("Exported files against the simulation", columns, rows, sortable=True)
        if rows
        else None
    )


def _cost_table(names: list[str], jobs: Sequence[Job]) -> Table:
    verbs = list(dict.fromkeys(verb for job in jobs for verb in job.section("stages")))
    rows: list[Row] = [
        [
            verb[:1].upper() + verb[1:],
            *(_number(job, ("stages", verb, "seconds"), seconds) for job in jobs),
        ]
        for verb in verbs
    ]
    rows.append(["Packed layers", *(_number(job, ("base", "bytes"), size) for job in jobs)])
    rows.append(
        ["Bits per weight", *(_number(job, ("base", "bits_per_weight"), fixed) for job in jobs)]
    )
    return Table("Time by stage, and size", ("", *names), rows)


def _recipe_table(names: list[str], jobs: Sequence[Job]) -> Table:
    shared = set.intersection(*(set(job.adapters) for job in jobs))
    flat = [
        dict(_lines("", {key: value for key, value in job.recipe.items() if key != "adapters"}))
        | {f"adapters.{name}": "there" for name in job.adapters if name not in shared}
        | {
            key: value
            for adapter in job.setting("adapters") or []
            if adapter.get("name") in shared
            for key, value in _lines(f"adapters.{adapter['name']}", adapter)
        }
        for job in jobs
    ]
    keys = list(dict.fromkeys(key for found in flat for key in found))
    rows: list[Row] = [
        [key, *(found.get(key, "not set") for found in flat)]
        for key in keys
        if len({found.get(key) for found in flat}) > 1
    ]
    return Table(
        "Lines of the recipes that differ",
        ("Key", *names),
        rows,
        left=tuple(range(1, len(jobs) + 1)),
    )


def _lines(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [
            p for k, v in value.items() for p in _lines(f"{prefix}.{k}" if prefix else str(k), v)
        ]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [
            p
            for number, item in enumerate(value)
            for p in _lines(f"{prefix}.{item.get('name', number)}", item)
        ]
    number = finite(value)
    shown = f"{number:g}" if number is not None else "null" if value is None else str(value)
    return [(prefix, without_folders(shown))]
