"""Renders report.html of a job, and the page that compares several jobs.

Both are single files: styles, script and drawings are inside, and a Content-Security-Policy makes
the browser itself refuse any request. Every name is escaped (jinja2's autoescape; `Drawing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from qwlora.report import number_format
from qwlora.report.comparison import comparison
from qwlora.report.key_figures import tiles
from qwlora.report.number_format import NOT_MEASURED, count, finite
from qwlora.report.results_view import Job, without_folders
from qwlora.report.sections import View, sections
from qwlora.report.verdict import remedies, verdict

REFRESH_SECONDS = 15
TRAINING_PATIENCE, STAGE_PATIENCE = 600.0, 1800.0  # at least, in seconds
_FIRST = {"running": ("training", "cost"), "finished": ()}  # sections; of a job that stopped: cost


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
    environment.globals["not_measured"] = NOT_MEASURED
    for name in ("count", "fixed", "listed", "percent", "perplexity", "significant"):
        environment.filters[name] = getattr(number_format, name)
    return environment


def render(job: Job) -> str:
    """report.html of a job, whatever its results hold."""
    judged, is_running = verdict(job), job.state == "running"
    remedy_lines, remedy_command = remedies(job)
    bits = f" · {job.bitwidth}-bit base" if job.bitwidth else ""
    adapters = f"{count(len(job.adapters))} adapter{'s' if len(job.adapters) != 1 else ''}"
    return (
        _environment()
        .get_template("page.html")
        .render(
            job=job,
            title=f"{job.title} · {judged.kind.label}",
            subtitle=f"{job.model}{bits}, {adapters}",
            verdict=judged,
            tiles=tiles(job),
            remedies=remedy_lines,
            remedy_command=remedy_command,
            message=without_folders(str(job.get("error", "message") or "")),
            error_page=str(job.get("error", "docs") or ""),
            second_rounding=without_folders(str(job.get("base", "second_rounding") or "")),
            sections=_sections(job),
            folds=_folds(job),
            refresh=REFRESH_SECONDS if is_running else None,
            updated=job.get("run", "updated") if is_running else None,
            patience=_patience(job),
        )
    )


def render_comparison(jobs: Sequence[Job]) -> str:
    """The page that compares jobs side by side."""
    return _environment().get_template("comparison.html").render(**comparison(jobs))


def _sections(job: Job) -> list[View]:
    """The sections of the whole job; with one adapter those of the adapter too."""
    names, first = job.adapters, _FIRST.get(job.state, ("cost",))
    shown = [
        drawn
        for section in sections()
        if len(names) == 1 or (names and section.of_job)
        if (drawn := section.drawn(job, names[0] if len(names) == 1 else "")) is not None
    ]
    return sorted(shown, key=lambda s: first.index(s["id"]) if s["id"] in first else len(first))


def _folds(job: Job) -> dict[str, list[View]]:
    """The sections of each of several adapters."""
    names, of_adapter = job.adapters, [section for section in sections() if section.of_adapter]
    folds = {
        name: [
            drawn
            for section in of_adapter
            if (drawn := section.drawn(job, name, f"{section.id}-{number}")) is not None
        ]
        for number, name in enumerate(names if len(names) > 1 else (), 1)
    }
    return {name: fold for name, fold in folds.items() if fold}


def _patience(job: Job) -> float:
    """Seconds without an update after which a running job may have stopped.

    A stage writes nothing until it ends, and the next may take much longer than those before.
    """
    if job.section("run", "training"):
        return max(3 * (job.number("run", "training", "step_seconds") or 0.0), TRAINING_PATIENCE)
    stages = [finite(part.get("seconds")) or 0.0 for part in job.finished_stages.values()]
    return max(3 * max(stages, default=0.0), STAGE_PATIENCE)
