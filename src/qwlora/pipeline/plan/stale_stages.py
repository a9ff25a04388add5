"""Finds the stages that are out of date, why, and the commands that run them. Imports no torch.

A stage is current if it ran with the inputs of the plan, its files exist unmodified, and all stages
that it needs, directly or indirectly, are current.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from qwlora.errors import DirectoryError
from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.plan.stage import VERBS, Stage


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


def upstream(plan: Sequence[Stage], name: str) -> list[Stage]:
    """The stage `name` and all it needs, directly or indirectly, in the order of the plan."""
    names = {name}
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


def check_needs(
    plan: Sequence[Stage],
    waiting: Sequence[Stage],
    verbs: Collection[str],
    folder: Path,
    stale: Mapping[str, str],
    command: Callable[[str], str] | None = None,
) -> None:
    """Check that no stage in `waiting` needs others that are neither current nor requested.

    Raises:
        DirectoryError: names all commands that must run first.
    """
    missing, added = set[str](), [need for stage in waiting for need in stage.needs]
    by_name = {stage.name: stage for stage in plan}
    while added:
        need = by_name[added.pop()]
        if need.name in stale and need.verb not in verbs and need.name not in missing:
            missing.add(need.name)
            added += need.needs
    if missing:
        what = " and ".join(dict.fromkeys(stage.verb for stage in waiting))
        reasons = {s.name: stale[s.name] for s in plan if s.name in missing}
        raise missing_error(what, reasons, folder, command)


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
    verbs = [verb for verb in VERBS if verb in needed]
    return DirectoryError(
        f"{what} needs {', '.join(reasons)}, missing or out of date in {str(folder)!r}:\n"
        + "".join(f"  {name}: {reason}\n" for name, reason in reasons.items())
        + f"Run first: {command_line(verbs, folder, command)}"
    )


def command_line(
    verbs: Iterable[str], folder: Path, command: Callable[[str], str] | None = None
) -> str:
    """The commands that run `verbs` one after the other on the job in `folder`."""
    run = command or (lambda verb: shlex.join(["qwlora", verb, "--out", str(folder)]))
    return " && ".join(run(verb) for verb in verbs)


def run_line(folder: Path, *options: str) -> str:
    """The command that runs the whole job in `folder`."""
    return shlex.join(
        ["qwlora", "run", str(folder / "recipe.yaml"), "--out", str(folder), *options]
    )
