"""Name the stages that others need, and the commands that run them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from qwlora.errors import DirectoryError
from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.plan.stage import Stage
from qwlora.pipeline.stages import VERBS


def check_needs(
    plan: list[Stage],
    waiting: list[Stage],
    verbs: Collection[str],
    directory: Directory,
    stale: Mapping[str, str],
    command: Callable[[str], str],
) -> None:
    """Raise an error if a stage needs others that are neither current nor requested.

    The error names all commands that must run first.
    """
    by_name, lacking = {s.name: s for s in plan}, set[str]()

    def find_lacking(stage: Stage) -> None:
        for need in (by_name[name] for name in stage.needs):
            if need.name in stale and need.verb not in verbs and need.name not in lacking:
                lacking.add(need.name)
                find_lacking(need)

    for stage in waiting:
        find_lacking(stage)
    if lacking:
        asking = dict.fromkeys(s.verb for s in waiting)
        needed = [s for s in plan if s.name in lacking]
        raise lacking_error(" and ".join(asking), needed, stale, directory.path, command)


def lacking_error(
    what: str,
    needed: Sequence[Stage],
    stale: Mapping[str, str],
    folder: Path,
    command: Callable[[str], str],
) -> DirectoryError:
    """An error that names the stages that `what` needs, why each is stale, and the commands."""
    first = {stage.verb for stage in needed}
    return DirectoryError(
        f"{what} needs {', '.join(s.name for s in needed)}, missing or out of date in "
        f"{str(folder)!r}:\n"
        + "".join(f"  {stage.name}: {stale[stage.name]}\n" for stage in needed)
        + f"Run first: {' && '.join(command(verb) for verb in VERBS if verb in first)}"
    )


def command_line(verb: str, folder: Path) -> str:
    """The command that runs `verb` on the job in `folder`."""
    return shlex.join(["qwlora", verb, "--out", str(folder)])
