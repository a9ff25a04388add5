"""Renders report.html of a job, and the page that compares several jobs.

Both are single files: styles, script and drawings are inside, and a Content-Security-Policy makes
the browser itself refuse any request. Every name is escaped (jinja2's autoescape; `Drawing`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qwlora.report.comparison import comparison
from qwlora.report.number_format import count
from qwlora.report.remedies import remedies, remedy_command
from qwlora.report.results_view import Job, finite, without_folders
from qwlora.report.section import Section, View
from qwlora.report.sections import SECTIONS
from qwlora.report.sections.key_figures import tiles
from qwlora.report.verdict import verdict

REFRESH_SECONDS = 15
TRAINING_PATIENCE, STAGE_PATIENCE = 600.0, 1800.0  # at least, in seconds
_FIRST = {  # sections that come first while a job is not finished
    "running": ("training", "cost"),
    "failed": ("cost",),
    "interrupted": ("cost",),
    "incomplete": ("cost",),
}


@dataclass(frozen=True)
class Shown:
    """A section with what its template draws."""

    id: str
    section: Section
    view: View

    @property
    def question(self) -> str:
        return str(self.view.get("question") or self.section.question)


@dataclass(frozen=True)
class Fold:
    """The sections of one adapter; the first with a caution is open."""

    name: str
    sections: list[Shown]
    is_open: bool


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("qwlora.report", "templates"),
        autoescape=True,
        auto_reload=False,  # a job runs for hours; the package may be upgraded meanwhile
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["compact_json"] = _compact_json
    return environment


def _compact_json(value: Any) -> Markup:
    """JSON for a `script` element, which must not contain `</script>` or `<!--`."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))


def render(job: Job) -> str:
    """report.html of a job, whatever its results hold."""
    found = verdict(job)
    single = len(job.adapters) < 2
    return (
        _environment()
        .get_template("page.html")
        .render(
            job=job,
            title=f"{job.title} · {found.kind.label}",
            subtitle=_subtitle(job),
            verdict=found,
            tiles=tiles(job),
            remedies=remedies(job) if job.state == "failed" else [],
            remedy_command=without_folders(remedy_command(job)),
            message=without_folders(str(job.get("error", "message") or "")),
            error_page=str(job.get("error", "docs") or ""),
            sections=_sections(job),
            folds=[] if single else _folds(job),
            refresh=REFRESH_SECONDS if job.state == "running" else None,
            updated=job.get("run", "updated") if job.state == "running" else None,
            patience=_patience(job),
        )
    )


def render_comparison(jobs: Sequence[Job]) -> str:
    """The page that compares jobs side by side."""
    return _environment().get_template("comparison.html").render(**comparison(jobs))


def _sections(job: Job) -> list[Shown]:
    """The sections of the whole job; with one adapter those of the adapter too."""
    single = len(job.adapters) < 2
    shown = []
    for section in SECTIONS if job.adapters else ():
        if single or section.of_job:
            view = section.view(job, job.adapters[0] if single else None)
            if view is not None:
                shown.append(Shown(section.id, section, view))
    first = _FIRST.get(job.state, ())
    order = {id: number for number, id in enumerate(first)}
    return sorted(shown, key=lambda s: order.get(s.id, len(order)))  # keeps the order of others


def _folds(job: Job) -> list[Fold]:
    folds: list[Fold] = []
    for name in job.adapters:
        sections = [
            Shown(f"{section.id}-{number}", section, view)
            for number, section in enumerate(SECTIONS, 100 * (len(folds) + 1))
            if section.of_adapter and (view := section.view(job, name)) is not None
        ]
        if sections:
            folds.append(Fold(name, sections, not folds))
    return folds


def _subtitle(job: Job) -> str:
    bits = job.setting("base", "weights")
    width = bits.get("bitwidth") if isinstance(bits, dict) else None
    base = f" · {width}-bit base" if width else ""
    number = len(job.adapters)
    return f"{job.model}{base}, {count(number)} adapter{'s' if number != 1 else ''}"


def _patience(job: Job) -> float:
    """Seconds without an update after which a running job may have stopped.

    A stage writes nothing until it ends, and the next may take much longer than those before.
    """
    if job.section("run", "training"):
        return max(3 * (job.number("run", "training", "step_seconds") or 0.0), TRAINING_PATIENCE)
    stages: list[Any] = [part.get("seconds") for part in job.finished_stages.values()]
    longest = max((x for x in map(finite, stages) if x is not None), default=0.0)
    return max(3 * longest, STAGE_PATIENCE)
