"""Rebuild the reports of jobs from the records of their stages, and compare jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qwlora.errors import DirectoryError
from qwlora.pipeline.commands.open_job import JobState, job_recipe
from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.job.output_path import as_directory_errors
from qwlora.pipeline.plan.stage import Stage
from qwlora.pipeline.plan.stale_stages import run_line, upstream
from qwlora.pipeline.results.results import (
    REPORT,
    collect_results,
    job_of,
    last_status,
    merge_results,
)
from qwlora.report.page import render, render_comparison
from qwlora.report.results_view import BASE, Job
from qwlora.system.atomic import write_text

PAGE_MARK = '<meta name="generator" content="QWLoRA">'


def read_job(folder: Path) -> Job:
    """A job as it is now: the results of the stages that are current, by the rules of `run`.

    Raises:
        DirectoryError: the folder is not a job directory, or nothing has run in it.
        RecipeError: its recipe is not valid.
        SourceError: the recipe's model or text is not there any more.
    """
    recipe, status = job_recipe(folder), last_status(folder)
    if not Directory.read(folder).records and not status:
        raise DirectoryError(
            f"{str(folder)!r} has no results yet. Run the job first: `{run_line(folder)}`"
        )
    state = JobState(folder, recipe)
    plan, directory = state.plan, state.directory
    results = collect_results(directory, state.recipe, plan, state.stale())
    merge_results(results, status)
    run = results.setdefault("run", {})
    keys = {name: record.key for name, record in directory.records.items()}
    is_outdated = any(keys.get(stage.name) != stage.key for stage in plan)
    if run.setdefault("state", "finished") == "finished" and is_outdated:
        run["state"] = "incomplete"
    return job_of(folder, state.recipe, results, _changed_proofs(plan, directory))


def _changed_proofs(plan: list[Stage], directory: Directory) -> Mapping[tuple[str, str], str]:
    """Why files are no longer those that were checked, by target and adapter."""
    changed = dict[tuple[str, str], str]()
    for stage in plan:
        if stage.verb == "verify" and stage.name in directory.records:
            for needed in upstream(plan, stage.name):
                is_recorded = needed.name in directory.records
                if is_recorded and (reason := directory.problem(needed.name, None)) is not None:
                    _, target, *adapter = stage.name.split("/")
                    changed.setdefault((target, adapter[0] if adapter else BASE), reason)
    return changed


def rebuild_reports(folders: Sequence[Path], page: Path | None = None) -> list[Path]:
    """Write the report of each job, and for several jobs the page that compares them.

    Args:
        page: the page that compares; needed for several jobs. It replaces an older one.

    Returns:
        The files that were written.

    Raises:
        DirectoryError, RecipeError, SourceError: see `read_job`; or a file cannot be written.
    """
    if page is not None and page.exists():
        with page.open(encoding="utf-8", errors="replace") as file:
            if PAGE_MARK not in file.read(2000):
                raise DirectoryError(
                    f"{str(page)!r} exists and is not a page of qwlora. Give another --out"
                )
    jobs, written = [read_job(folder) for folder in folders], []
    for folder, job in zip(folders, jobs, strict=True):
        with as_directory_errors(folder):
            write_text(folder / REPORT, render(job))
        written.append(folder / REPORT)
    if page is not None:
        with as_directory_errors(page.parent):
            write_text(page, render_comparison(jobs))
        written.append(page)
    return written
