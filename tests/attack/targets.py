"""The commands that are killed, or that find the disk full."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .jobs import Job, artifacts, differences, digests, half_written, state
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
        if (place / MERGED).exists() and digests(place / MERGED) != digests(self.after / MERGED):
            found.append("the merged model is half-written")
        return found

    def unequal(self, place: Path, ended: Ended) -> list[str]:
        """How a run that ended differs from the undisturbed one."""
        if ended.code:
            return [f"run again: exit code {ended.code}: {ended.err.strip()[-300:]}"]
        found = differences(state(place / "job"), state(self.after / "job"))
        names = (sorted(p.name for p in folder.iterdir()) for folder in (place, self.after))
        here, there = (set(n) - {"logs", "ballast"} for n in names)
        found += [f"left behind: {sorted(here ^ there)}"] * (here != there)
        if (self.after / MERGED).exists():
            found += differences(digests(place / MERGED), digests(self.after / MERGED), "/merged")
        return found


def make_target(
    name: str, arguments: tuple[str, ...], before: Path, place: Path, reference: Path | None = None
) -> Target:
    """Run the command undisturbed, and see that it ends like `reference`, if there is one."""
    after = place / "targets" / name.replace(" ", "-").replace(",", "")
    target = Target(name, arguments, before, after, 0, 0)
    target.put(after)
    count = place / "changes"
    logs = place / "logs"
    ended = start(counting_changes(target.action(after), after, count), logs).wait()
    assert ended.code == 0, f"{name}: {ended.err}"
    if reference is not None:
        unequal = differences(artifacts(after / "job"), artifacts(reference))
        assert not unequal, f"{name}: {unequal}"
    return Target(name, arguments, before, after, ended.seconds, int(count.read_text()))


def stage_target(job: Job, verb: str, place: Path, what: str) -> Target:
    """A verb of a job, for the first time."""
    arguments = (verb, str(job.recipe), "--out", "job")
    return make_target(f"{verb}: {what}", arguments, job.before(verb), place, job.after[verb])


def again_target(job: Job, verb: str, change: str, place: Path) -> Target:
    """A verb of a finished job with a change, so that its artifacts are replaced."""
    arguments = (verb, str(job.recipe), "--out", "job", "--set", change)
    return make_target(f"{verb}: replaces the finished one", arguments, job.finished, place)


def merge_target(job: Job, into: str, place: Path) -> Target:
    arguments = ("merge", "job", "first", "--into", into, "--out", MERGED)
    return make_target(f"merge: into {into}", arguments, job.finished, place)
