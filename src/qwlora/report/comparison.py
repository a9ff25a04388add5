"""The page that compares jobs, with only the lines of the recipes that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from qwlora.errors import size
from qwlora.report import number_format as form
from qwlora.report.drawing import Drawing, Row, chart, figure, shortened
from qwlora.report.number_format import fixed, three_decimals
from qwlora.report.results_view import KINDS, Job, capitalized, runtime, without_folders
from qwlora.report.sections import Cell, Table
from qwlora.report.sections.runtime_parity import parity_cells
from qwlora.report.sections.training_course import SMOOTHED, course, loss_axes
from qwlora.report.verdict import verdict

COLORS = {"float": "k-float", "base": "d-loss", "adapted": "d-gain", "simulated": "d-held2"}
MOST_LINES = 8  # colors of lines


@dataclass(frozen=True)
class Series:
    """An adapter of a job, with a name for it."""

    name: str
    job: Job
    adapter: str

    @property
    def perplexity(self) -> float | None:
        """Of the last model that was evaluated."""
        kind = self.job.final_kind(self.adapter)
        return self.job.perplexity(kind, self.adapter) if kind else None

    @property
    def text(self) -> str:
        """The source of its text, and the counts of its held-out tokens: another split, length or
        tokenizer makes others."""
        data = self.job.adapter_settings().get(self.adapter, {}).get("data") or {}
        name = self.job.text_of(self.adapter)
        counts = self.job.section(*(("texts", name) if name else ("data",)))
        source = data.get("source") or self.job.setting("data", "source")
        return str((source, counts.get("held_out"), counts.get("evaluation")))


def comparison(jobs: Sequence[Job]) -> dict[str, Any]:
    """What the template draws."""
    names = _names(jobs)
    is_single = all(len(job.adapters) == 1 for job in jobs)
    series = [
        Series(name if is_single else f"{name}, {adapter}", job, adapter)
        for name, job in zip(names, jobs, strict=True)
        for adapter in job.adapters
    ]
    measured: list[Any] = [s for s in series if s.perplexity is not None]
    share_a_text = len({s.text for s in series}) == 1
    return {
        "title": f"{' and '.join(names[:2])}{' …' if len(names) > 2 else ''} · QWLoRA comparison",
        "verdicts": {name: verdict(job) for name, job in zip(names, jobs, strict=True)},
        "ranked": sorted(measured, key=lambda s: s.perplexity),
        "share_a_text": share_a_text,
        "stages": _stage_table(series),
        "stage_figure": _stage_figure(series),
        "size_quality": _size_quality(series) if share_a_text else None,
        "training": _training_figure(series),
        "smoothed": SMOOTHED,
        "parity": _parity_table(series),
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


def _stage_table(series: list[Series]) -> Table:
    rows: list[dict[str, Cell]] = []
    for s in series:
        kl = ("kl", "simulated", s.adapter, "mean")  # missing in jobs that compare with float LoRA
        paths = {title: s.job.path(kind, s.adapter) for kind, title in KINDS.items()}
        rows.append(
            {
                "Job": s.name,
                "Bits per weight": s.job.shown(fixed, "base", "bits_per_weight"),
                **{title: s.job.shown(three_decimals, *path) for title, path in paths.items()},
                "KL to float, simulated": s.job.shown(form.significant, *kl),
            }
        )
    return Table("Perplexity on held-out text, by stage", rows, sortable=True)


def _stage_figure(series: list[Series]) -> Markup | str:
    rows = []
    for s in series:
        known = {k: value for k in KINDS if (value := s.job.perplexity(k, s.adapter)) is not None}
        dots = [(v, COLORS[k], f"{KINDS[k]}: {v:.3f}") for k, v in known.items()]
        last = three_decimals(list(known.values())[-1]) if known else "not measured"
        rows.append(Row(s.name, last, dots=dots))
    if not any(row.dots for row in rows):
        return ""
    return figure(lambda width: chart("Perplexity by stage and job", rows, width))


def _size_quality(series: list[Series]) -> dict[str, Any] | None:
    """Of jobs with bases of different sizes that were tested on the same text: those that no other
    equals both in bits per packed weight, encodings included, and in perplexity."""
    numbers = [(s.job.number("base", "bits_per_weight"), s.perplexity, s.name) for s in series]
    points = sorted((bits, value, name) for bits, value, name in numbers if bits and value)
    if len({bits for bits, *_ in points}) < 2:
        return None
    best = points[:1]
    for point in points:
        best += [point] if point[1] < best[-1][1] else []
    return {"best": best, "are_all": len(best) == len(points)}


def _training_figure(series: list[Series]) -> Markup | str:
    courses = {s.name: run.means for s in series if (run := course(s.job, s.adapter)) is not None}
    lines = dict(list(courses.items())[:MOST_LINES])
    if not lines:
        return ""
    title, steps = f"Training loss, mean of {SMOOTHED} steps", max(map(len, lines.values()))
    words = "; ".join(
        f"{name}: {means[0]:.3f} to {means[-1]:.3f} in {len(means)} steps"
        for name, means in lines.items()
    )

    def draw(width: int) -> Drawing:
        values = [value for means in lines.values() for value in means]
        drawing, x, y = loss_axes(width, title, f"{words}.", steps, values)
        for number, (name, means) in enumerate(lines.items()):
            points = [(x(n), y(value)) for n, value in enumerate(means, 1)]
            px, py = points[-1]
            drawing.polyline(points[:: max(1, len(points) // 800)], f"mark s{number}")
            drawing.circle(px, py, 3, f"mark c{number}", f"{name}: {means[-1]:.3f}")
            drawing.label(px - 8, py - 6, shortened(name, 138, 12), f"t{number}", "end")
        return drawing

    return figure(draw)


def _parity_table(series: list[Series]) -> Table:
    rows: list[dict[str, Cell]] = [
        {"Files": f"{s.name}: {runtime(target)}", **parity_cells(s.job, target, s.adapter)}
        for s in series
        for target in s.job.targets
    ]
    return Table("Exported files against what they were made of", rows, sortable=True)


def _cost_table(names: list[str], jobs: Sequence[Job]) -> Table:
    verbs = dict.fromkeys(verb for job in jobs for verb in job.section("stages"))
    rows: list[dict[str, Cell]] = [
        {
            "Job": name,
            **{capitalized(v): job.shown(form.seconds, "stages", v, "seconds") for v in verbs},
            "Packed layers": job.shown(size, "base", "bytes"),
        }
        for name, job in zip(names, jobs, strict=True)
    ]
    return Table("Time by stage, and size", rows, sortable=True)


def _recipe_table(names: list[str], jobs: Sequence[Job]) -> Table:
    shared = set.intersection(*(set(job.adapters) for job in jobs))
    recipes = [
        _lines("", {key: value for key, value in job.recipe.items() if key != "adapters"})
        | {f"adapters.{name}": "there" for name in job.adapters if name not in shared}
        | _lines("adapters", {n: s for n, s in job.adapter_settings().items() if n in shared})
        for job in jobs
    ]
    rows: list[dict[str, Cell]] = []
    for key in dict.fromkeys(key for lines in recipes for key in lines):
        values = [lines.get(key, "not set") for lines in recipes]
        if len(set(values)) > 1:
            rows.append({"Key": key, **dict(zip(names, values, strict=True))})
    return Table("Lines of the recipes that differ", rows, words=names)


def _lines(prefix: str, value: Any) -> dict[str, str]:
    """The values of nested settings by dotted key."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {item.get("name", number): item for number, item in enumerate(value)}
    if isinstance(value, dict):
        lines: dict[str, str] = {}
        for key, item in value.items():
            lines |= _lines(f"{prefix}.{key}" if prefix else str(key), item)
        return lines
    number = form.finite(value)
    shown = f"{number:g}" if number is not None else "null" if value is None else str(value)
    return {prefix: without_folders(shown)}
