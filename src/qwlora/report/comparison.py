"""The page that compares jobs: columns are jobs, and only the recipe's lines that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from qwlora.report import number_format as form
from qwlora.report.drawing import Drawing, Scale, figure, is_narrow, shortened, ticks
from qwlora.report.number_format import fixed, precise_percent, three_decimals
from qwlora.report.results_view import KINDS, Job, capitalized, runtime, without_folders
from qwlora.report.sections import Cell, Table
from qwlora.report.sections.training_course import SMOOTHED, course
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
        """The source of its text."""
        data = self.job.adapter_settings().get(self.adapter, {}).get("data") or {}
        return str(data.get("source") or self.job.setting("data", "source"))


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
    return {
        "title": f"{' and '.join(names[:2])}{' …' if len(names) > 2 else ''} · QWLoRA comparison",
        "verdicts": {name: verdict(job) for name, job in zip(names, jobs, strict=True)},
        "ranked": sorted(measured, key=lambda s: s.perplexity),
        "share_a_text": _share_a_text(series),
        "stages": _stage_table(series),
        "stage_figure": _stage_figure(series),
        "size_quality": _size_quality(series),
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


def _share_a_text(series: list[Series]) -> bool:
    return len({s.text for s in series}) == 1


def _stage_table(series: list[Series]) -> Table:
    rows: list[dict[str, Cell]] = [
        {
            "Stage": title,
            **{s.name: s.job.shown(three_decimals, *s.job.path(kind, s.adapter)) for s in series},
        }
        for kind, title in KINDS.items()
    ]
    last: dict[str, Cell] = {"Stage": "KL to float, simulated"}
    for s in series:
        path = (*s.job.path("simulated", s.adapter, "kl"), "mean")
        last[s.name] = s.job.shown(form.significant, *path)
    return Table("Perplexity on held-out text, by stage", [*rows, last])


def _stage_figure(series: list[Series]) -> Markup | str:
    rows = {
        s.name: {k: value for k in KINDS if (value := s.job.perplexity(k, s.adapter)) is not None}
        for s in series
    }
    values = [value for row in rows.values() for value in row.values()]
    if not values:
        return ""
    margin = max((max(values) / min(values)) ** 0.06, 1.005)
    words = "; ".join(
        f"{name}: " + ", ".join(f"{KINDS[kind]} {value:.3f}" for kind, value in row.items())
        for name, row in rows.items()
    )

    def draw(width: int) -> Drawing:
        narrow = is_narrow(width)
        left, step = (0, 56) if narrow else (180, 44)
        ends = min(values) / margin, max(values) * margin
        scale, height = Scale(*ends, left + 8, width - 20, logarithmic=True), 44 + step * len(rows)
        drawing = Drawing(width, height, "Perplexity by stage and job", f"{words}.")
        drawing.vertical_grid(scale, 8, height - 28)
        for number, (name, row) in enumerate(rows.items()):
            y = 28 + step * number + (14 if narrow else 0)
            drawing.text(0, y - 12 if narrow else y + 5, shortened(name, 170), "lb")
            if row:
                drawing.line(scale(min(row.values())), y, scale(max(row.values())), y, "conn")
            for kind, value in row.items():
                title = f"{KINDS[kind]}: {value:.3f}"
                drawing.circle(scale(value), y, 5, f"mark {COLORS[kind]}", title)
        return drawing

    return figure(draw)


class Point(NamedTuple):
    """Bits per packed weight, encodings included, and perplexity on held-out text."""

    bits: float
    perplexity: float
    name: str

    def is_beaten_by(self, other: Point) -> bool:
        """Whether `other` is at least as good in both, and better in one."""
        is_equal = other[:2] == self[:2]
        return not is_equal and other.bits <= self.bits and other.perplexity <= self.perplexity


def _size_quality(series: list[Series]) -> dict[str, Any] | None:
    """The plot of jobs with bases of different sizes that were tested on the same text; points that
    another one beats are hollow."""
    numbers = [(s.job.number("base", "bits_per_weight"), s.perplexity, s.name) for s in series]
    points = [Point(bits, value, name) for bits, value, name in numbers if bits and value]
    if len({point.bits for point in points}) < 2 or not _share_a_text(series):
        return None
    best = [p for p in points if not any(p.is_beaten_by(other) for other in points)]
    bits, values = [p.bits for p in points], [p.perplexity for p in points]
    described = "; ".join(f"{p.name}: {p.perplexity:.3f} at {p.bits:.2f} bits" for p in points)

    def draw(width: int) -> Drawing:
        left, right, bottom = 44, width - 16, 240
        x = Scale(min(bits) * 0.95, max(bits) * 1.05, left, right)
        y = Scale(min(values) * 0.97, max(values) * 1.03, bottom, 20, logarithmic=True)
        drawing = Drawing(width, 280, "Perplexity by size of the base", f"{described}.")
        drawing.horizontal_grid(y, left, right)
        for tick in ticks(x.low, x.high, 5):
            drawing.text(x(tick), bottom + 18, f"{tick:g}", "ax", "middle")
        drawing.text(right, bottom + 36, "bits per packed weight", "ax", "end")
        for point in points:
            px, py = x(point.bits), y(point.perplexity)
            title = f"{point.name}: {three_decimals(point.perplexity)}"
            drawing.circle(px, py, 5, f"mark {'m-data' if point in best else 'm-rtn'}", title)
            side, anchor = (-12, "end") if px > width - 120 else (12, "start")
            drawing.label(px + side, py + 4, shortened(point.name, 110, 12), "ax", anchor)
        return drawing

    return {"best": sorted(best), "are_all": len(best) == len(points), "figure": figure(draw)}


def _training_figure(series: list[Series]) -> Markup | str:
    courses = {s.name: run.means for s in series if (run := course(s.job, s.adapter)) is not None}
    lines = dict(list(courses.items())[:MOST_LINES])
    if not lines:
        return ""
    values = [value for means in lines.values() for value in means]
    margin = 0.06 * ((max(values) - min(values)) or 1)
    words = "; ".join(
        f"{name}: {means[0]:.3f} to {means[-1]:.3f} in {len(means)} steps"
        for name, means in lines.items()
    )

    def draw(width: int) -> Drawing:
        narrow = is_narrow(width)
        left, right = 40, width - (16 if narrow else 150)
        x = Scale(1, max(2, *map(len, lines.values())), left, right)
        y = Scale(min(values) - margin, max(values) + margin, 240, 16)
        drawing = Drawing(width, 268, f"Training loss, mean of {SMOOTHED} steps", f"{words}.")
        drawing.horizontal_grid(y, left, right)
        drawing.text(right, 260, f"step {form.count(x.high)}", "ax", "end")
        for number, (name, means) in enumerate(lines.items()):
            points = [(x(n), y(value)) for n, value in enumerate(means, 1)]
            px, py = points[-1]
            drawing.polyline(points[:: max(1, len(points) // 800)], f"mark s{number}")
            drawing.circle(px, py, 3, f"mark c{number}", f"{name}: {means[-1]:.3f}")
            side, anchor = (-8, "end") if narrow else (8, "start")
            drawing.label(px + side, py + 4, shortened(name, 138, 12), f"t{number}", anchor)
        return drawing

    return figure(draw)


def _parity_table(series: list[Series]) -> Table:
    rows: list[dict[str, Cell]] = []
    for s in series:
        for target in s.job.targets:
            place, drift = ("parity", target, s.adapter), s.job.drift(target, s.adapter)
            is_passed = s.job.get(*place, "passed")
            row: dict[str, Cell] = {
                "Perplexity off by": None if drift is None else precise_percent(abs(drift)),
                "Same token": s.job.shown(precise_percent, *place, "top1_agreement"),
                "Noise floor": s.job.shown(precise_percent, *place, "floor_top1_agreement"),
                "Worst layer, steps": s.job.shown(fixed, *place, "worst_layer_steps"),
                "Check": None if is_passed is None else "passed" if is_passed else "failed",
            }
            if (target, s.adapter) in s.job.stale:
                row = dict.fromkeys(row)
            rows.append({"Files": f"{s.name}: {runtime(target)}", **row})
    return Table("Exported files against the simulation", rows, sortable=True)


def _cost_table(names: list[str], jobs: Sequence[Job]) -> Table:
    verbs = dict.fromkeys(verb for job in jobs for verb in job.section("stages"))
    measures = {
        **{capitalized(verb): (form.seconds, ("stages", verb, "seconds")) for verb in verbs},
        "Packed layers": (form.size, ("base", "bytes")),
        "Bits per weight": (fixed, ("base", "bits_per_weight")),
    }
    rows: list[dict[str, Cell]] = []
    for title, (written, path) in measures.items():
        cells = [job.shown(written, *path) for job in jobs]
        rows.append({"": title, **dict(zip(names, cells, strict=True))})
    return Table("Time by stage, and size", rows)


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
