"""Open a job that exists, for commands that read it or add to its results."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.errors import DirectoryError, RecipeError
from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.job.output_path import as_directory_errors
from qwlora.pipeline.plan.plan import make_plan, resolve_compute
from qwlora.pipeline.plan.stage import JobTexts
from qwlora.pipeline.plan.stale_stages import (
    JobState,
    command_line,
    find_stale,
    job_recipe,
    run_line,
)
from qwlora.pipeline.results.results import last_status, write_results
from qwlora.pipeline.running import new_context
from qwlora.system.progress import Track, untracked

if TYPE_CHECKING:
    from qwlora.pipeline.running.loaded_models import JobContext

_COUNTS = ("data.evaluation_sequences", "data.calibration_sequences")


def open_job(
    folder: Path,
    adapter: str | None = None,
    changes: tuple[str, ...] = (),
    track: Track = untracked,
) -> tuple[JobContext, str]:
    """The context of an existing job, and the name of one of its trained adapters.

    Args:
        adapter: default: the first in the recipe.
        changes: changes to the job's recipe for this context only; see `load_recipe`.

    Raises:
        DirectoryError: there is no such job or trained adapter, or files of the adapter or the base
            are missing or modified.
        RecipeError: a change is of something else than the simulation and the counts of sequences:
            the base and the adapters exist already.
        FingerprintError: the adapter was trained on a different base.
    """
    recipe = job_recipe(folder, changes)
    keys = {change: change.partition("=")[0] for change in changes}
    refused = [c for c, k in keys.items() if k.split(".")[0] != "simulation" and k not in _COUNTS]
    if refused:
        options = [part for change in refused for part in ("--set", change)]
        problem = (
            f"{shlex.join(options)}: this command can only change simulation.* and "
            f"{' and '.join(_COUNTS)}. Run the job with the change first: "
            f"{run_line(folder, *options)}"
        )
        raise RecipeError(str(folder / "recipe.yaml"), [problem])
    name = adapter or recipe.adapters[0].name
    if not (folder / "adapters" / name).is_dir():
        known = ", ".join(adapter.name for adapter in recipe.adapters)
        raise DirectoryError(
            f"{str(folder)!r} has no trained adapter {name!r}; the recipe has {known}. Train it: "
            f"{command_line('train', folder)}"
        )
    job = JobState(folder, recipe)
    if f"train/{name}" in {stage.name for stage in job.plan}:
        job.require(f"train/{name}", f"adapter {name!r}", whatever_inputs=True)
    context = new_context(job.recipe, job.texts, folder, track)
    from qwlora.adapter.adapter_folder import check_adapter

    check_adapter(folder / "adapters" / name, context.base_fingerprint)
    return context, name


def check_current(context: JobContext, stages: Iterable[str]) -> None:
    """Check that stages of the context's job, and all that they need, are current."""
    job = JobState(context.path, context.recipe, context.texts)
    for stage in stages:
        job.require(stage)


def is_calibrated(context: JobContext, name: str) -> bool:
    """Whether adapter `name` is calibrated in the context's job.

    Raises:
        DirectoryError: the calibration is of another recipe, adapter or base.
    """
    if not (context.path / "simulation" / name).is_dir():
        return False
    check_current(context, [f"calibrate/{name}"])
    return True


def add_task_scores(folder: Path, model: str, stage: str, scores: dict[str, Any]) -> dict[str, Any]:
    """Add scores of tasks to the results of a job, and rewrite results.json and report.html.

    They are results of the stage that made the model: dropped when it runs again. Scores of other
    tasks stay.

    Args:
        model: its name in results.json, such as `adapted/NAME`.
        scores: by task.
    """
    recipe = resolve_compute(job_recipe(folder))
    with Directory.open(folder, recipe) as directory:
        plan = make_plan(recipe, JobTexts(recipe), directory.digests)
        results = copy.deepcopy(directory.records[stage].results)
        tasks = results.setdefault("tasks", {})
        for part in model.split("/", 1):
            tasks = tasks.setdefault(part, {})
        tasks.update(scores)
        stale = find_stale(plan, directory)
        with as_directory_errors(folder):
            directory.set_results(stage, results)
        return write_results(directory, recipe, plan, stale, last_status(folder))
