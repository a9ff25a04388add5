"""The commands that are killed, or that find the disk full."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .jobs import Job, differences, digests, half_written, state
from .victims import Ended, command, counting_changes, inside, start

MERGED = "merged"


@dataclass(frozen=True)
class Target:
    """A command, the job that it starts from, and what an undisturbed run of it leaves.

    Args:
        name: its row in the table.
        arguments: of the command line, which runs in the folder that holds `job` and `merged`.
        before: the job's directory before; `None` if there is none yet.
        after: a folder with `job`, and `merged` if the command makes one.
        seconds: how long the undisturbed run took.
        changes: to the disk in it.
    """

    name: str
    arguments: tuple[str, ...]
    before: Path
    after: Path
    seconds: float
    changes: int

    def put(self, place: Path) -> None:
        """What there is before the command runs."""
        place.mkdir(parents=True, exist_ok=True)
        if self.before.exists():
            shutil.copytree(self.before, place / "job")

    def action(self, place: Path) -> Callable[[], None]:
        return inside(place, command(*self.arguments))

    def visible_damage(self, place: Path) -> list[str]:
        """What is half-written."""
        found = half_written(place / "job", self.before, self.after / "job")
        if self._merged(place) not in ({}, self._merged(self.after)):
            found.append("the merged model is half-written")
        return found

    def unequal(self, place: Path, ended: Ended) -> list[str]:
        """How a run that ended differs from the undisturbed one."""
        if "is not empty" in ended.err and self._merged(place) == self._merged(self.after):
            return []  # killed after the last step of a merge, which is not done twice
        if ended.code:
            return [f"run again: exit code {ended.code}: {ended.err.strip()[-300:]}"]
        found = differences(state(place / "job"), state(self.after / "job"))
        names = (sorted(p.name for p in folder.iterdir()) for folder in (place, self.after))
        here, there = (set(n) - {"logs", "ballast"} for n in names)
        found += [f"left behind: {sorted(here ^ there)}"] * (here != there)
        return found + differences(self._merged(place), self._merged(self.after), "/merged")

    def _merged(self, place: Path) -> dict[str, str]:
        """The merged model's files; names that begin with a dot are not visible."""
        files = digests(place / MERGED)
        return {name: digest for name, digest in files.items() if not name.startswith(".")}


def stage_target(job: Job, verb: str, what: str) -> Target:
    """A verb of a job, for the first time. Building the job was the undisturbed run."""
    arguments = (verb, str(job.recipe), "--out", "job")
    after, name = job.after[verb].parent, f"{verb}: {what}"
    return Target(name, arguments, job.before(verb), after, job.seconds[verb], job.changes[verb])


def again_target(job: Job, verb: str, change: str, place: Path) -> Target:
    """A verb of a finished job with a change, so that its artifacts are replaced."""
    arguments = (verb, str(job.recipe), "--out", "job", "--set", change, "--replace", "first")
    return _run(Target(f"{verb}: replaces the finished one", arguments, job.finished, place, 0, 0))


def merge_target(job: Job, into: str, place: Path) -> Target:
    """A merge of a job's first adapter."""
    arguments = ("merge", "job", "first", "--into", into, "--out", MERGED)
    return _run(Target(f"merge: into {into}", arguments, job.finished, place, 0, 0))


def change_target(job: Job, name: str, arguments: tuple[str, ...], place: Path) -> Target:
    """A command that changes a finished job in another way than a stage does."""
    return _run(Target(name, arguments, job.finished, place, 0, 0))


def _run(target: Target) -> Target:
    """Run the command undisturbed."""
    target.put(target.after)
    count = target.after.with_suffix(".changes")
    action = counting_changes(target.action(target.after), target.after, count)
    ended = start(action, target.after.with_suffix(".logs")).wait()
    assert ended.code == 0, f"{target.name}: {ended.err}"
    return replace(target, seconds=ended.seconds, changes=int(count.read_text()))
