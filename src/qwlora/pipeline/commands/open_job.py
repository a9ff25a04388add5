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
from qwlora.pipeline.job.directory_errors import as_directory_errors
from qwlora.pipeline.job.job_texts import JobTexts
from qwlora.pipeline.plan.missing_stages import command_line, lacking_error
from qwlora.pipeline.plan.plan import make_plan, resolve_compute
from qwlora.pipeline.plan.stage import Stage
from qwlora.pipeline.plan.stale_stages import find_stale, upstream
from qwlora.pipeline.results.job_files import last_status, write_results
from qwlora.pipeline.running.new_context import new_context
from qwlora.progress import Track, untracked
from qwlora.recipe import Recipe

_COUNTS = ("data.evaluation_sequences", "data.calibration_sequences")


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
    recipe = resolve_compute(job_recipe(folder, changes))
    if made := tuple(change for change in changes if not _is_harmless_change(change)):
        _refuse_changes(folder, made)
    name = adapter or recipe.adapters[0].name
    if not (folder / "adapters" / name).is_dir():
        known = ", ".join(adapter.name for adapter in recipe.adapters)
        raise DirectoryError(
            f"{str(folder)!r} has no trained adapter {name!r}; the recipe has {known}. Train it: "
            f"{command_line('train', folder)}"
        )
    texts = JobTexts(recipe)
    directory = Directory.read(folder)
    plan = make_plan(recipe, texts, directory.digests)
    stale = find_stale(upstream(plan, f"train/{name}"), directory, whatever_inputs=True)
    if stale:
        raise lacking_error(
            f"adapter {name!r}",
            [s for s in plan if s.name in stale],
            stale,
            folder,
            lambda verb: command_line(verb, folder),
        )
    context = new_context(recipe, texts, folder, track)
    from qwlora.adapter.adapter_folder import check_adapter

    check_adapter(folder / "adapters" / name, context.base_fingerprint)
    return context, name


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


def job_recipe(folder: Path, changes: tuple[str, ...] = ()) -> Recipe:
    """The recipe of an existing job.

    Raises:
        DirectoryError: the folder is not a job directory.
        RecipeError: the recipe or a change is not valid.
    """
    from qwlora.recipe import load_recipe

    journal.finish(folder)
    check_job(folder)
    return load_recipe(folder / "recipe.yaml", changes)


def check_current(context: Any, stage: str) -> None:
    """Check that a stage of the context's job, and all that it needs, is current.

    Raises:
        DirectoryError: it is not, or the recipe no longer has this stage.
    """
    _check_current(context.path, context.recipe, context.texts, stage)


def check_stages(folder: Path, stages: Iterable[str]) -> None:
    """Check that a job can be written, and that its stages are current.

    Raises:
        DirectoryError: it cannot, or one is not.
    """
    recipe = resolve_compute(job_recipe(folder))
    texts = JobTexts(recipe)
    Directory.read(folder).check_writable()
    for stage in stages:
        _check_current(folder, recipe, texts, stage)


def _check_current(path: Path, recipe: Recipe, texts: JobTexts, stage: str) -> None:
    directory = Directory.read(path)
    plan = make_plan(recipe, texts, directory.digests)
    needed = upstream(plan, stage)
    if not needed:
        raise DirectoryError(
            f"{str(path)!r} holds {stage}, but its recipe no longer does; add it to the "
            "recipe and run the job again"
        )
    if stale := find_stale(needed, directory):
        raise lacking_error(
            stage,
            [s for s in needed if s.name in stale],
            stale,
            path,
            lambda verb: command_line(verb, path),
        )


def is_calibrated(context: Any, name: str) -> bool:
    """Whether adapter `name` is calibrated in the context's job.

    Raises:
        CalibrationError: the calibration is of another recipe, adapter or base.
    """
    if not (context.path / "simulation" / name).is_dir():
        return False
    directory, stage = Directory.read(context.path), f"calibrate/{name}"
    plan = make_plan(context.recipe, context.texts, directory.digests)
    if stage not in {s.name for s in plan}:
        known = ", ".join(adapter.name for adapter in context.recipe.adapters)
        raise CalibrationError(
            f"adapter {name!r} in {str(context.path)!r} is from an earlier version of the recipe, "
            f"which now has {known}; choose one of these"
        )
    if reason := find_stale(upstream(plan, stage), directory).get(stage):
        raise CalibrationError(
            f"the calibration of adapter {name!r} in {str(context.path)!r} is out of date: it "
            f"is of another recipe, adapter or base ({reason}). Calibrate again: "
            f"{command_line('calibrate', context.path)}"
        )
    return True


def _is_harmless_change(change: str) -> bool:
    """Whether a change can be applied to an existing job without redoing its base or adapters."""
    key = change.partition("=")[0]
    return key.split(".")[0] == "simulation" or key in _COUNTS


def _refuse_changes(folder: Path, changes: tuple[str, ...]) -> None:
    from qwlora.recipe import load_recipe

    path = folder / "recipe.yaml"
    before, after = (
        {stage.name: stage.key for stage in _plan_of(load_recipe(path, given))}
        for given in ((), changes)
    )
    again = [
        name
        for name, key in after.items()
        if name.partition("/")[0] in ("quantize", "calibrate-base", "train")
        and before.get(name) != key
    ]
    asked = shlex.join(_as_options(changes))
    if not again:
        raise RecipeError(str(path), [f"{asked}: has no effect on this command; remove it"])
    raise RecipeError(
        str(path),
        [
            f"{asked}: needs {', '.join(again)} to run again, but this command can only change "
            f"{', '.join(('simulation.*', *_COUNTS))}. Run the job with the change first: "
            + shlex.join(["qwlora", "run", str(path), "--out", str(folder), *_as_options(changes)])
        ],
    )


def _as_options(changes: Iterable[str]) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def _plan_of(recipe: Recipe) -> list[Stage]:
    recipe = resolve_compute(recipe)
    return make_plan(recipe, JobTexts(recipe))
