"""Read a job that exists: its recipe, its adapters, and whether its stages are current."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwlora.errors import CalibrationError, DirectoryError, RecipeError
from qwlora.pipeline.job import journal
from qwlora.pipeline.job.directory import Directory, check_job
from qwlora.pipeline.job.job_texts import JobTexts
from qwlora.pipeline.job.output_path import as_directory_errors
from qwlora.pipeline.plan.plan import make_plan, resolve_compute
from qwlora.pipeline.plan.stale_stages import (
    command_line,
    find_stale,
    missing_error,
    run_line,
    upstream,
)
from qwlora.pipeline.results.results import last_status, write_results
from qwlora.pipeline.running.new_context import new_context
from qwlora.recipe import Recipe, load_recipe
from qwlora.system.progress import Track, untracked

_COUNTS = ("data.evaluation_sequences", "data.calibration_sequences")


class JobState:
    """An existing job: its directory, and the plan of a recipe for it.

    Args:
        texts: of the recipe, if they were read before.
    """

    def __init__(self, folder: Path, recipe: Recipe, texts: JobTexts | None = None):
        self.folder, self.recipe = folder, resolve_compute(recipe)
        self.texts = texts or JobTexts(self.recipe)
        self.directory = Directory.read(folder)
        self.plan = make_plan(self.recipe, self.texts, self.directory.digests)

    def stale(self) -> dict[str, str]:
        """The stages that are not current, and why."""
        return find_stale(self.plan, self.directory)

    def require(self, stage: str, what: str = "", whatever_inputs: bool = False) -> None:
        """Check that a stage, and all that it needs, is current.

        Args:
            what: needs the stage; default: its name.
            whatever_inputs: see `find_stale`.

        Raises:
            DirectoryError: it is not, or the recipe no longer has this stage.
        """
        needed = upstream(self.plan, stage)
        if not needed:
            raise DirectoryError(
                f"{str(self.folder)!r} holds {stage}, but its recipe no longer does; add it to the "
                "recipe and run the job again"
            )
        if stale := find_stale(needed, self.directory, whatever_inputs):
            raise missing_error(what or stage, stale, self.folder)


def open_job(
    folder: Path,
    adapter: str | None = None,
    changes: tuple[str, ...] = (),
    track: Track = untracked,
) -> tuple[Any, str]:
    """The context of an existing job, and the name of one of its trained adapters.

    Args:
        adapter: default: the first in the recipe.
        changes: changes to the job's recipe for this context only; see `load_recipe`.

    Raises:
        DirectoryError: the folder is not a job directory, has no such trained adapter, or files of
            the adapter or the base are missing or modified.
        RecipeError: a change would affect the base or the adapters, which exist already.
        FingerprintError: the adapter was trained on a different base.
    """
    recipe = job_recipe(folder, changes)
    keys = {change: change.partition("=")[0] for change in changes}
    harmless = [c for c, k in keys.items() if k.split(".")[0] == "simulation" or k in _COUNTS]
    if refused := tuple(change for change in changes if change not in harmless):
        _refuse_changes(folder, refused)
    name = adapter or recipe.adapters[0].name
    if not (folder / "adapters" / name).is_dir():
        known = ", ".join(adapter.name for adapter in recipe.adapters)
        raise DirectoryError(
            f"{str(folder)!r} has no trained adapter {name!r}; the recipe has {known}. Train it: "
            f"{command_line(['train'], folder)}"
        )
    job = JobState(folder, recipe)
    if f"train/{name}" in {stage.name for stage in job.plan}:
        job.require(f"train/{name}", f"adapter {name!r}", whatever_inputs=True)
    context = new_context(job.recipe, job.texts, folder, track)
    from qwlora.adapter.adapter_folder import check_adapter

    check_adapter(folder / "adapters" / name, context.base_fingerprint)
    return context, name


def job_recipe(folder: Path, changes: tuple[str, ...] = ()) -> Recipe:
    """The recipe of an existing job.

    Raises:
        DirectoryError: the folder is not a job directory.
        RecipeError: the recipe or a change is not valid.
    """
    journal.finish(folder)
    check_job(folder)
    return load_recipe(folder / "recipe.yaml", changes)


def add_task_scores(folder: Path, model: str, stage: str, scores: dict[str, Any]) -> dict[str, Any]:
    """Add scores of tasks to the results of a job, and rewrite results.json and report.html.

    They are results of the stage that made the model: dropped when it runs again. Scores of other
    tasks stay.

    Args:
        model: its name in results.json, such as `adapted/NAME`.
        scores: by task.

    Returns:
        The content of results.json.

    Raises:
        DirectoryError: the folder is not a job directory, is in use, or cannot be written.
    """
    recipe = resolve_compute(job_recipe(folder))
    with Directory.open(folder, recipe) as directory:
        plan = make_plan(recipe, JobTexts(recipe), directory.digests)
        stale = find_stale(plan, directory)
        results = copy.deepcopy(directory.records[stage].results)
        tasks = results.setdefault("tasks", {})
        for part in model.split("/", 1):
            tasks = tasks.setdefault(part, {})
        tasks.update(scores)
        with as_directory_errors(folder):
            directory.set_results(stage, results)
        return write_results(directory, recipe, plan, stale, last_status(folder))


def check_current(context: Any, stages: Iterable[str]) -> None:
    """Check that stages of the context's job, and all that they need, are current.

    Raises:
        DirectoryError: one is not, or the recipe no longer has it.
    """
    job = JobState(context.path, context.recipe, context.texts)
    for stage in stages:
        job.require(stage)


def is_calibrated(context: Any, name: str) -> bool:
    """Whether adapter `name` is calibrated in the context's job.

    Raises:
        CalibrationError: the calibration is of another recipe, adapter or base.
    """
    if not (context.path / "simulation" / name).is_dir():
        return False
    job = JobState(context.path, context.recipe, context.texts)
    needed = upstream(job.plan, f"calibrate/{name}")
    if not needed:
        known = ", ".join(adapter.name for adapter in context.recipe.adapters)
        raise CalibrationError(
            f"adapter {name!r} in {str(context.path)!r} is from an earlier version of the recipe, "
            f"which now has {known}; choose one of these"
        )
    if reason := find_stale(needed, job.directory).get(f"calibrate/{name}"):
        raise CalibrationError(
            f"the calibration of adapter {name!r} in {str(context.path)!r} is out of date: it "
            f"is of another recipe, adapter or base ({reason}). Calibrate again: "
            f"{command_line(['calibrate'], context.path)}"
        )
    return True


def _refuse_changes(folder: Path, changes: tuple[str, ...]) -> None:
    """Raise an error about changes that need the base or adapters anew, or do nothing."""
    path, options = folder / "recipe.yaml", [o for c in changes for o in ("--set", c)]
    keys = []
    for asked in ((), changes):
        recipe = resolve_compute(load_recipe(path, asked))
        keys.append({stage.name: stage.key for stage in make_plan(recipe, JobTexts(recipe))})
    before, after = keys
    verbs = ("quantize", "calibrate-base", "train")
    again = [s for s, k in after.items() if s.split("/")[0] in verbs and before.get(s) != k]
    problem = "has no effect on this command; remove it"
    if again:
        problem = (
            f"needs {', '.join(again)} to run again, but this command can only change "
            f"{', '.join(('simulation.*', *_COUNTS))}. Run the job with the change first: "
            f"{run_line(folder, *options)}"
        )
    raise RecipeError(str(path), [f"{shlex.join(options)}: {problem}"])
