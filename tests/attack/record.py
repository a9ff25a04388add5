"""What was attacked and what held, and the tables of docs/log/reliability.md that say so."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .victims import parallel

# The page explains each of them above MARKER.
SECTIONS = {
    "kills": "Killed processes",
    "changes": "Killed changes of a job",
    "disks": "Full disks",
    "damage": "Damaged and swapped files",
    "reports": "Reports of damaged jobs",
    "bundles": "Bundles that somebody else made",
    "unfinished": "Damaged checkpoints of unfinished stages",
    "hostile": "Hostile inputs",
    "folders": "Strange folders and the Python API",
    "records": "Records of somebody else",
    "adapters": "Exports of wrong adapters",
    "fuzz": "Random damage to models and encodings files",
    "python": "Calls of the Python API that fail",
    "races": "Races of two processes",
}
MARKER = "<!-- written by make test-attack; do not edit below -->\n"


@dataclass
class Record:
    """Attacks tried and held, by section and row, and the failures in words."""

    rows: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    # by section and reason, files and who reads them
    harmless: dict[str, dict[str, dict[str, list[str]]]] = field(default_factory=dict)

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

    def add_harmless(self, section: str, file: str, reader: str, why: str) -> None:
        """A file whose damage this reader need not notice."""
        readers = self.harmless.setdefault(section, {}).setdefault(why, {}).setdefault(file, [])
        if reader not in readers:
            readers.append(reader)

    def check(self, since: int = 0) -> None:
        """Fail with everything that did not hold since there were `since` failures."""
        found = self.failures[since:]
        listed = "\n".join(found[:60])
        assert not found, f"{len(found)} attacks did not hold:\n{listed}"

    def to_markdown(self) -> str:
        attacked = [section for section in SECTIONS if section in self.rows]
        totals = {
            SECTIONS[section]: [sum(c) for c in zip(*self.rows[section].values(), strict=True)]
            for section in attacked
        }
        lines = _table("attack", totals)
        for section in attacked:
            lines += ["", f"## {SECTIONS[section]}", "", *_table("what", self.rows[section])]
            if section in self.harmless:
                lines += ["", "Harmless, and why:", ""]
            for why, files in sorted(self.harmless.get(section, {}).items()):
                listed = (f"`{file}` ({', '.join(readers)})" for file, readers in files.items())
                lines.append(f"- {why}: {'; '.join(listed)}")
        return "\n".join(lines) + "\n"


def _table(head: str, rows: dict[str, list[int]]) -> list[str]:
    lines = (f"| {name} | {tried} | {held} |" for name, (tried, held) in rows.items())
    return [f"| {head} | tried | held |", "|---|--:|--:|", *lines]
