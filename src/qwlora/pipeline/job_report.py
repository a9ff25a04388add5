"""Writes a job's report.html, from its results.json and recipe.yaml. Imports no torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwlora.atomic import write_text
from qwlora.errors import DirectoryError, QwloraWarning
from qwlora.pipeline.directory import Directory
from qwlora.pipeline.directory_errors import as_directory_errors
from qwlora.recipe import Recipe, load_recipe
from qwlora.recipe.yaml_core import dump_yaml
from qwlora.report.checks import BASE
from qwlora.report.job import Job
from qwlora.report.page import render, render_comparison

REPORT = "report.html"
PAGE_MARK = '<meta name="generator" content="QWLoRA">'


def write_report(folder: Path, results: dict[str, Any], recipe: Recipe) -> None:
    """Write the report of a job whose results are known to be up to date.

    A report that cannot be drawn is a bug, and no reason to stop a job of hours: it warns.

    Raises:
        DirectoryError: the file cannot be written.
    """
    job = Job(results, *_as_read(recipe), folder.absolute().name)
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


def read_job(folder: Path) -> Job:
    """A job as its report sees it: proofs of exported files that changed since are out of date.

    Raises:
        DirectoryError: the folder is not a job directory, or its results are damaged.
        RecipeError: its recipe is not valid.
    """
    try:
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it does not hold keys and values")
    except FileNotFoundError as error:
        raise DirectoryError(
            f"{str(folder)!r} is not a job directory: it has no results.json; `qwlora run` writes "
            "one"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DirectoryError(
            f"{str(folder / 'results.json')!r} cannot be read ({error}). Run the job again; "
            "finished stages are not repeated"
        ) from error
    recipe, recipe_text = _as_read(load_recipe(folder / "recipe.yaml"))
    job = Job(content, recipe, recipe_text, folder.absolute().name)
    directory = Directory.read(folder)
    stale = {}
    for target in job.targets:
        for name in job.section("parity", target):
            own, base = f"export/{target}/{name}", f"export/{target}"  # a base of its own, or none
            stages = [base] if base in directory.records else []
            for stage in stages if name == BASE else [own, *stages]:
                if (reason := directory.problem(stage, None)) is not None:
                    stale[target, name] = reason
    return Job(content, recipe, recipe_text, job.name, stale)


def rebuild_reports(folders: Sequence[Path], page: Path | None = None) -> list[Path]:
    """Write the report of each job, and for several jobs the page that compares them.

    Args:
        page: the page that compares; needed for several jobs.

    Returns:
        The files that were written.

    Raises:
        DirectoryError: see `read_job`; or a file cannot be written.
    """
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


def _as_read(recipe: Recipe) -> tuple[dict[str, Any], str]:
    """The recipe with every default, as values and as text."""
    content = recipe.model_dump(mode="json")
    return content, dump_yaml(content)
