"""What was attacked and what held, and the page that says so."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .victims import parallel

SECTIONS = {
    "kills": (
        "Killed processes",
        "SIGKILL at a random moment of a stage, or right before a random change to the disk. Held: "
        "nothing half-written is visible, and the same command again ends with the same artifacts.",
    ),
    "changes": (
        "Killed changes of a job",
        "SIGKILL right before each change to the disk of a command that changes a finished job. "
        "Then the same command and `train` run, or `train` alone. Held: the job is what it is with "
        "the change made; if the command was not repeated, it may also be what it was before.",
    ),
    "disks": (
        "Full disks",
        "Too little free space for the stage. Held: one message, exit code 2, nothing half-written, "
        "and the same command ends with the same artifacts once there is space.",
    ),
    "damage": (
        "Damaged and swapped files",
        "Every kind of file in three finished jobs: a bit at six places (half of the time with the "
        "old modification time), cut, emptied, deleted, swapped. Then what reads it runs. Held: "
        "exit code 2 with one message, QWLoRA's own exception, or harmless as listed below.",
    ),
    "reports": (
        "Reports of damaged jobs",
        "The same damage, or every number in results.json replaced; then `report`. Held: the page "
        "lets files be shipped only if all artifacts are those that were proven, and shows no "
        "number that nobody measured; or exit code 2 with one message.",
    ),
    "bundles": (
        "Bundles that somebody else made",
        "Files of every target's bundle are changed, replaced by programs, folders, links or pipes, "
        "removed and added, and digests agree. Then `verify`. Held: refused with one message or "
        "failed, no program of the bundle ran, and it passed only where that is harmless.",
    ),
    "unfinished": (
        "Damaged checkpoints of unfinished stages",
        "Held: the stage ends with the same artifacts as an undisturbed run, or refuses with one "
        "message.",
    ),
    "hostile": (
        "Hostile inputs",
        "Held: one message, exit code 2, nothing written, within a minute, and no code has run.",
    ),
    "folders": (
        "Strange folders and the Python API",
        "One file of a folder is a pipe, or a link to a device. Held: an exception of QWLoRA.",
    ),
    "records": (
        "Records of somebody else",
        "A record lists a device, a pipe, or a file outside of its folder, with a digest that "
        "agrees. Held: refused, by the Python API and by the command line.",
    ),
    "adapters": (
        "Exports of wrong adapters",
        "`export` gets an adapter next to a right one that is of another base or kind, changed, not "
        "finite, or cannot have its name; or simulations that changed. Held: one exception that "
        "names the adapter and what to do, nothing is written, and models are what they were.",
    ),
    "fuzz": (
        "Random damage to models and encodings files",
        "Every format that QWLoRA reads, broken at random and read whole. Held: it is read, or "
        "refused with an exception of QWLoRA.",
    ),
    "python": (
        "Calls of the Python API that fail",
        "A full disk at changes of a call, an error or Ctrl-C at a random operator of torch. Held: "
        "folder or model is what it was, and the same call then succeeds; of a call that packs "
        "layers one by one, every later call says that it failed.",
    ),
    "races": (
        "Races of two processes",
        "Two processes start within 0.3 s of each other. Held: exit codes 0 and 2 only, exactly one "
        "did the work, and its files are all there afterwards.",
    ),
}


@dataclass
class Record:
    """Attacks tried and held, by section and row, and the failures in words."""

    rows: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    harmless: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, section: str, row: str, problem: str, how: str = "") -> None:
        """One attack. `problem` is empty if it held; `how` says which attack it was."""
        counts = self.rows.setdefault(section, {}).setdefault(row, [0, 0])
        counts[0] += 1
        counts[1] += not problem
        if problem:
            self.failures.append(f"{section}: {row}: {how}: {problem}")

    def attack(
        self,
        section: str,
        trials: Iterable[Any],
        attack: Callable[[Any, Path], Sequence[tuple[str, str, str]]],
        folder: Path,
    ) -> None:
        """Run `attack(trial, own folder)` of all trials, count what held, and fail with the rest.

        Args:
            attack: returns the arguments of `add`, for each row that the trial counts in.
        """
        known, since = list(trials), len(self.failures)
        for trial, result in zip(known, parallel(attack, known, folder), strict=True):
            if isinstance(result, dict):
                result = [("crashed", result["error"], str(trial))]
            for row, problem, how in result:
                self.add(section, row, problem, how)
        self.check(since)

    def add_harmless(self, section: str, what: str, why: str) -> None:
        """Something that need not be noticed."""
        self.harmless.setdefault(section, {})[what] = why

    def tried(self, section: str) -> int:
        return sum(tried for tried, _ in self.rows.get(section, {}).values())

    def check(self, since: int = 0) -> None:
        """Fail with everything that did not hold since there were `since` failures."""
        found = self.failures[since:]
        listed = "\n".join(found[:60])
        assert not found, f"{len(found)} attacks did not hold:\n{listed}"

    def to_markdown(self) -> str:
        lines = ["| attack | tried | held |", "|---|--:|--:|"]
        for section, (title, _) in SECTIONS.items():
            rows = self.rows.get(section, {}).values()
            lines.append(f"| {title} | {sum(t for t, _ in rows)} | {sum(h for _, h in rows)} |")
        for section, (title, text) in SECTIONS.items():
            if rows := self.rows.get(section):
                lines += ["", f"## {title}", "", text, "", *_table(section, rows)]
            if harmless := self.harmless.get(section):
                lines += ["", "Harmless, and why:", ""]
                things: dict[str, list[str]] = {}
                for what, why in sorted(harmless.items()):
                    things.setdefault(why, []).append(what)
                lines += [f"- {why}: {_grouped(whats)}" for why, whats in sorted(things.items())]
        return "\n".join(lines) + "\n"


def _grouped(whats: Sequence[str]) -> str:
    """What is harmless for one reason: each file once, with its targets or without its readers."""
    owners: dict[str, list[str]] = {}
    for what in whats:
        file, _, owner = what.partition(", read by ")[0].partition(" of ")
        owners.setdefault(file, []).append(owner)
    files: dict[str, list[str]] = {}
    for file, names in owners.items():
        files.setdefault(", ".join(filter(None, names)), []).append(file)
    return "; ".join(", ".join(of) + f" of {names}" * bool(names) for names, of in files.items())


def _table(section: str, rows: dict[str, list[int]]) -> Sequence[str]:
    head = {"damage": "file, and who reads it", "unfinished": "file", "hostile": "input"}
    head |= {"fuzz": "format", "bundles": "target, and what is changed", "adapters": "target"}
    table = [f"| {head.get(section, 'what')} | tried | held |", "|---|--:|--:|"]
    merged: dict[str, tuple[list[str], list[int]]] = {}  # of the long tables: a row for each file
    for name, counts in rows.items():
        key, _, part = name.partition(": ") if section in ("damage", "bundles") else (name, "", "")
        parts, total = merged.setdefault(key, ([], [0, 0]))
        parts += [part] * bool(part)
        total[:] = [a + b for a, b in zip(total, counts, strict=True)]
    for key, (parts, (tried, held)) in merged.items():
        table.append(
            f"| {': '.join([key, *[', '.join(parts)] * bool(parts)])} | {tried} | {held} |"
        )
    return table
