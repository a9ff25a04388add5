"""Write what a job shows people: results.json, report.html and the model cards.

Nothing reads these files back. What a run leaves for the next command, besides the records of its
stages, is in `.qwlora/status.json`, with a checksum.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qwlora import strict_json
from qwlora.atomic import write_text
from qwlora.errors import QwloraWarning
from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.job.directory_errors import as_directory_errors
from qwlora.pipeline.job.stage_records import Record, read_record
from qwlora.pipeline.plan.stage import Stage
from qwlora.pipeline.results.model_cards import write_cards
from qwlora.pipeline.results.results import collect_results, job_of, merge_results
from qwlora.recipe import Recipe
from qwlora.report.page import render
from qwlora.report.results_view import Job

REPORT = "report.html"
STATUS = "status.json"


def write_results(
    directory: Directory,
    recipe: Recipe,
    plan: list[Stage],
    stale: Collection[str],
    status: dict[str, Any],
) -> dict[str, Any]:
    """Write results.json, report.html and the model cards; returns the results.

    Args:
        status: keys that no stage recorded: `run`, `error`, and what a failed check measured.
    """
    results = collect_results(directory, recipe, plan, stale)
    merge_results(results, status)
    with as_directory_errors(directory.path):
        write_text(directory.private / STATUS, Record("", results=status).text("run"))
        write_text(directory.path / "results.json", strict_json.dumps(results, indent=1) + "\n")
    job = job_of(directory.path, recipe, results)
    _write_report(directory.path, job)
    write_cards(directory, recipe, job)
    return results


def last_status(folder: Path) -> dict[str, Any]:
    """The status that the last run wrote; empty if there is none, or it is damaged."""
    record = read_record(folder / ".qwlora" / STATUS, "run")
    return {} if record is None else record.results


def _write_report(folder: Path, job: Job) -> None:
    """A report that cannot be drawn is a bug, and no reason to stop a job of hours: it warns."""
    try:
        page = render(job)
    except Exception as error:
        warnings.warn(
            f"{str(folder / REPORT)!r} was not written ({type(error).__name__}: {error}). The job "
            "and results.json are not affected; report this as a bug",
            QwloraWarning,
            stacklevel=2,
        )
        return
    with as_directory_errors(folder):
        write_text(folder / REPORT, page)
