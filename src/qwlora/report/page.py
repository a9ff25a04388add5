"""Renders report.html of a job: a single file, with styles, script and drawings inside."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from qwlora.report import number_format
from qwlora.report.number_format import NOT_MEASURED, count, finite
from qwlora.report.results_view import Job, without_folders
from qwlora.report.sections import DETAILS, ReportSection, View, sections
from qwlora.report.verdict import remedies, verdict

REFRESH_SECONDS = 15
TRAINING_PATIENCE, STAGE_PATIENCE = 600.0, 1800.0  # at least, in seconds


@cache
def _environment() -> Environment:
    # Names of adapters and texts of a stranger's job are escaped here and in `Drawing`, and the
    # page's Content-Security-Policy makes the browser refuse any request.
    # A job runs for hours, and the package may be upgraded meanwhile: nothing is reloaded.
    environment = Environment(
        loader=PackageLoader("qwlora.report", "templates"),
        autoescape=True,
        auto_reload=False,
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
    judged, is_running, names = verdict(job), job.state == "running", job.adapters
    bits = f" · {job.bitwidth}-bit base" if job.bitwidth else ""
    adapters = f"{count(len(names))} adapter{'s' if len(names) != 1 else ''}"
    alone = names[0] if len(names) == 1 else ""
    shown = _views(job, alone, [s for s in sections() if alone or (names and s.of_job)])
    of_each = [s for s in sections() if s.of_adapter and not alone]
    folds = {name: _views(job, name, of_each, f"-{n}") for n, name in enumerate(names, 1)}
    template = _environment().get_template("page.html")
    return template.render(
        job=job,
        title=f"{job.title} · {judged.kind.label}",
        subtitle=f"{job.model}{bits}, {adapters}",
        verdict=judged,
        remedies=remedies(job),
        remedy_command=without_folders(job.command),
        message=without_folders(str(job.get("error", "message") or "")),
        error_page=str(job.get("error", "docs") or ""),
        second_rounding=without_folders(str(job.get("base", "second_rounding") or "")),
        cautions=list(job.data_cautions()),
        sections=shown,
        folds={name: fold for name, fold in folds.items() if fold},
        details=DETAILS,
        refresh=REFRESH_SECONDS if is_running else None,
        updated=job.get("run", "updated") if is_running else None,
        patience=_patience(job),
    )


def _views(job: Job, adapter: str, chosen: Sequence[ReportSection], suffix: str = "") -> list[View]:
    drawn = (section.drawn(job, adapter, f"{section.id}{suffix}") for section in chosen)
    return [view for view in drawn if view is not None]


def _patience(job: Job) -> float:
    """Seconds without an update after which a running job may have stopped."""
    # A stage writes nothing until it ends, and the next may take much longer than those before.
    if job.section("run", "training"):
        return max(3 * (job.number("run", "training", "step_seconds") or 0.0), TRAINING_PATIENCE)
    stages = [finite(part.get("seconds")) or 0.0 for part in job.finished_stages.values()]
    return max(3 * max(stages, default=0.0), STAGE_PATIENCE)
