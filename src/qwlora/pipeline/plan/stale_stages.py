"""Finds the stages that are out of date, why, and the commands that run them; and protects trained
adapters: one that was trained with other settings is replaced only on request. Imports no torch.

A stage is current if it ran with the inputs of the plan, its files exist unmodified, and all stages
that it needs, directly or indirectly, are current.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import copy_context
from functools import cached_property
from pathlib import Path
from typing import Any

from qwlora.errors import DirectoryError, RecipeError, suggestion
from qwlora.pipeline import VERBS
from qwlora.pipeline.job import journal
from qwlora.pipeline.job.directory import Directory, check_job
from qwlora.pipeline.job.stage_records import Stage
from qwlora.pipeline.plan.plan import JobTexts, make_plan, resolve_compute
from qwlora.recipe import Adapter, Recipe, load_recipe
from qwlora.recipe.section import must_exist
from qwlora.system.progress import Track, untracked


def find_stale(
    plan: Sequence[Stage], directory: Directory, whatever_inputs: bool = False
) -> dict[str, str]:
    """The stages of `plan` that are not current and the reason for each, in the order of the plan.

    Args:
        whatever_inputs: check only that the stages' files exist unmodified, not that the inputs are
            those of the plan.
    """
    stale: dict[str, str] = {}
    for stage in plan:
        reason = directory.problem(stage.name, None if whatever_inputs else stage.key)
        if reason is None and (needs := [need for need in stage.needs if need in stale]):
            reason = f"reads {', '.join(needs)}"
        if reason is not None:
            stale[stage.name] = reason
    return stale


def upstream(plan: Sequence[Stage], *stages: str) -> list[Stage]:
    """The `stages` and all they need, directly or indirectly, in the order of the plan."""
    names = set(stages)
    for stage in reversed(plan):
        if stage.name in names:
            names |= set(stage.needs)
    return [stage for stage in plan if stage.name in names]


def dependents(plan: Sequence[Stage], name: str) -> list[str]:
    """Names of the stages that depend on `name`, directly or indirectly."""
    names = {name}
    for stage in plan:  # stages are listed after the ones they need
        if names & set(stage.needs):
            names.add(stage.name)
    return [stage.name for stage in plan if stage.name in names - {name}]


class JobState:
    """An existing job: its recipe, its directory, and its plan, for which the texts are read.

    Args:
        changes: changes to the recipe, see `load_recipe`.
        device: another one than the recipe's; no stage is stale for that.
    """

    def __init__(
        self,
        folder: Path,
        changes: tuple[str, ...] = (),
        track: Track = untracked,
        device: str | None = None,
    ):
        change = () if device is None else (f"device={device}",)
        self.folder, self.changes = folder, changes
        self.recipe = resolve_compute(job_recipe(folder, (*changes, *change)))
        self.texts, self.track = JobTexts(self.recipe, track), track
        self.directory = Directory.read(folder)

    @cached_property
    def plan(self) -> list[Stage]:
        return make_plan(self.recipe, self.texts, self.directory.digests)

    def stale(self) -> dict[str, str]:
        return find_stale(self.plan, self.directory)

    def require(self, stage: str, what: str = "", whatever_inputs: bool = False) -> None:
        """Check that a stage of the plan, and all that it needs, is current.

        Args:
            what: needs the stage; default: its name.
            whatever_inputs: see `find_stale`.
        """
        needed = upstream(self.plan, stage)
        if stale := find_stale(needed, self.directory, whatever_inputs):
            raise missing_error(what or stage, stale, self.folder)


def job_recipe(folder: Path, changes: tuple[str, ...] = ()) -> Recipe:
    """The recipe of an existing job. Texts and a model that it names may be missing."""
    journal.finish(folder)
    check_job(folder)
    return _stored_recipe(folder, changes)


def _stored_recipe(folder: Path, changes: tuple[str, ...] = ()) -> Recipe:
    context = copy_context()
    context.run(must_exist.set, False)
    return context.run(load_recipe, folder / "recipe.yaml", changes)


def adapter_named(recipe: Recipe, name: str, folder: Path) -> Adapter:
    """An adapter of the job in `folder`; the error says which names are similar."""
    adapters = {adapter.name: adapter for adapter in recipe.adapters}
    if name not in adapters:
        similar = suggestion(name, list(adapters))
        raise DirectoryError(f"{str(folder)!r} has no adapter {name!r}{similar}")
    return adapters[name]


def check_needs(
    plan: Sequence[Stage],
    waiting: Sequence[Stage],
    verbs: Collection[str],
    folder: Path,
    stale: Mapping[str, str],
    command: Callable[[str], str] | None = None,
) -> None:
    """Check that no stage in `waiting` needs others that are neither current nor requested. The
    error names all commands that must run first."""
    needed = [s for s in upstream(plan, *(s.name for s in waiting)) if s.verb not in verbs]
    if missing := {s.name: stale[s.name] for s in needed if s.name in stale}:
        what = " and ".join(dict.fromkeys(stage.verb for stage in waiting))
        raise missing_error(what, missing, folder, command)


def missing_error(
    what: str,
    reasons: Mapping[str, str],
    folder: Path,
    command: Callable[[str], str] | None = None,
) -> DirectoryError:
    """An error that names the stages that `what` needs, why each is stale, and the commands.

    Args:
        reasons: by stage, in the order of the plan.
        command: returns the command line that runs a verb.
    """
    needed = {name.partition("/")[0] for name in reasons}
    run = command or (lambda verb: command_line(verb, folder))
    return DirectoryError(
        f"{what} needs {', '.join(reasons)}, missing or out of date in {str(folder)!r}:\n"
        + "".join(f"  {name}: {reason}\n" for name, reason in reasons.items())
        + f"Run first: {' && '.join(run(verb) for verb in VERBS if verb in needed)}"
    )


def command_line(verb: str, folder: Path) -> str:
    """The command that runs `verb` on the job in `folder`."""
    return shlex.join(["qwlora", verb, "--out", str(folder)])


def run_line(folder: Path, *options: str) -> str:
    """The command that runs the whole job in `folder`."""
    return shlex.join(
        ["qwlora", "run", str(folder / "recipe.yaml"), "--out", str(folder), *options]
    )


def check_kept(
    waiting: Iterable[Stage],
    directory: Directory,
    recipe: Recipe,
    stale: Mapping[str, str],
    replace: bool,
) -> None:
    """Check that the recipe has every adapter that was trained in the directory, or added to it,
    and, unless `replace`, that no stage that is about to run replaces one trained with other
    settings.

    An adapter whose files are missing or damaged is trained again with the same settings, which
    replaces nothing.
    """
    folder, names = directory.path / "adapters", {adapter.name for adapter in recipe.adapters}
    before: Recipe | None = None
    with contextlib.suppress(RecipeError):
        before = _stored_recipe(directory.path)
    known = [adapter.name for adapter in before.adapters] if before else []
    added = known if names < {*known} else []  # else they were renamed before they were trained
    trained = [name for name in directory.trained_adapters() if (folder / name).is_dir()]
    if lost := [name for name in dict.fromkeys(trained + added) if name not in names]:
        raise DirectoryError(
            f"{str(directory.path)!r} has adapters {', '.join(lost)}, which this recipe lacks. Run "
            f"{str(directory.path / 'recipe.yaml')!r}, add them to the recipe, or remove them: "
            f"qwlora adapters remove {directory.path} {lost[0]}"
        )
    if replace:
        return
    records = directory.records
    again = [s.name for s in waiting if s.name in records and records[s.name].key != s.key]
    replaced = sorted(names if "quantize" in again else {n for n in names if f"train/{n}" in again})
    if existing := [name for name in replaced if (folder / name).is_dir()]:
        reasons = [f"{name}: {stale[name]}" for name in again]
        if before is not None:
            unseen = "its recipe.yaml was edited, or a text, the model's files or qwlora changed"
            reasons = _differences(_trained_on(before), _trained_on(recipe)) or [unseen]
        raise DirectoryError(
            f"{str(directory.path)!r} has adapters that were trained differently, "
            f"{', '.join(existing)}:\n"
            + "".join(f"  {reason}\n" for reason in reasons)
            + "Nothing was changed. Give the new adapter another name, use another --out, or "
            "replace the old one with --replace (it stays in place until the new one is finished)"
        )


def _trained_on(recipe: Recipe) -> dict[str, Any]:
    """The settings that adapters depend on; those of an adapter by its name."""
    sections = {"model", "base", "data", "seed", "workflow"}
    sections |= {"simulation"} if recipe.workflow == "qwa-lora" else set()
    sections |= {"export"} if recipe.base.has_budget else set()  # targets limit its schemes
    adapters = {adapter.name: adapter.model_dump(mode="json") for adapter in recipe.adapters}
    return {**recipe.model_dump(mode="json", include=sections), **adapters}


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`key: old value, now new value` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    if old == new:
        return []
    before, after = ("the default" if value is None else f"{value!r}" for value in (old, new))
    return [f"{path}: {before}, now {after}"]
