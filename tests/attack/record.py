"""What was attacked and what held, and the page that says so."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .victims import parallel

SECTIONS = {
    "kills": (
        "Killed processes",
        "A process gets SIGKILL, half of the time at a random moment of the stage and half of the "
        "time right before a random change to the disk. Held: nothing half-written is visible, "
        "and the same command run again ends with the same artifacts, bit for bit, as a run that "
        "nobody disturbed.",
    ),
    "changes": (
        "Killed changes of a job",
        "A finished job of two adapters is changed, and the command gets SIGKILL right before each "
        "change that it makes to the disk, one after the other. Then either the same command and "
        "`train` run, or `train` alone. Held: the job is what it is with the change made, in every "
        "file and result; if the command was not repeated, it may also be what it was before.",
    ),
    "disks": (
        "Full disks",
        "The job is on a disk with too little free space for the stage. Held: one message, exit "
        "code 2, nothing half-written is visible, and the same command succeeds with the same "
        "artifacts once there is space.",
    ),
    "damage": (
        "Damaged and swapped files",
        "Every kind of file in three finished jobs, found by listing their directories, gets a "
        "flipped bit at six random places (half of the time with the old modification time "
        "restored), is cut at a random length, emptied, deleted, and swapped with another file. "
        "Then the commands and functions that read it run, for a cut and a swap all of them, else "
        "one in turn. Held: exit code 2 with one message, or QWLoRA's own exception in Python, or "
        "harmless as listed below.",
    ),
    "reports": (
        "Reports of damaged jobs",
        "A file of a finished job is damaged in the same ways, or every number in results.json is "
        "replaced, and `report` writes the page again. Held: the page says that files may be "
        "shipped only if all artifacts are those that were proven, and shows no number that "
        "nobody measured; or exit code 2 with one message.",
    ),
    "bundles": (
        "Bundles that somebody else made",
        "Every kind of file in the bundle of every target is changed and all digests are made to "
        "agree with it, as whoever makes a bundle can: one bit, other bytes, a program that the "
        "file's usual reader would run, a folder; or it is replaced by a link or a pipe, or "
        "removed; and files are added that no export writes. Then `verify` reads the bundle. Held: "
        "it is refused with one message or fails its proof, no program of the bundle ran, and it "
        "passed only where that is harmless.",
    ),
    "unfinished": (
        "Damaged checkpoints of unfinished stages",
        "The same damage to the files from which an interrupted stage resumes. Held: the stage "
        "ends with the same artifacts as an undisturbed run, or refuses with one message.",
    ),
    "hostile": (
        "Hostile inputs",
        "Held: one message, exit code 2, no traceback, nothing written, within a minute, and no "
        "code from the input has run.",
    ),
    "folders": (
        "Strange folders and the Python API",
        "`load_base`, `load_adapter`, `load_simulation`, `read_encodings` and `verify` read folders "
        "in which one file is a pipe, or a link to a device. Held: an exception of QWLoRA within a "
        "minute.",
    ),
    "records": (
        "Records of somebody else",
        "The record of a base, an adapter, a simulation or an exported base lists a device, a pipe, "
        "or a file outside of its folder, with a digest of its own that agrees. Held: it is "
        "refused, by the Python API with an exception of QWLoRA and by the command line with one "
        "message.",
    ),
    "adapters": (
        "Exports of wrong adapters",
        "`export` gets an adapter next to a right one: of another base, on another grid, changed "
        "since it was saved, with NaN, of more layers, another width or rank, of another kind than "
        "the target's, or with a name that it cannot have. Where the target takes simulations, "
        "base or adapter change after they were simulated, or simulations of other bases are mixed "
        "in. Held: one exception of QWLoRA that names the adapter and what to do, nothing is "
        "written, and model and simulations are what they were before.",
    ),
    "fuzz": (
        "Random damage to models and encodings files",
        "A model in every format that QWLoRA reads, a base, and AIMET's encodings files are broken "
        "at random: values, keys and structure of JSON and headers, bits, cut ends, repeated "
        "pieces, NaN and infinite numbers. Then they are read whole. Held: they are read, or "
        "refused with an exception of QWLoRA.",
    ),
    "python": (
        "Calls of the Python API that fail",
        "A disk is full at each change that a call makes to it, one after the other; or an error "
        "or Ctrl-C hits a random operator of torch. Held: the folder or the model is what it was "
        "before, and the same call then succeeds; of a call that packs layers one by one, every "
        "later call says that it failed.",
    ),
    "races": (
        "Races of two processes",
        "Two processes start within 0.3 s of each other. Held: exit codes 0 and 2 only, exactly "
        "one process did the work, and its files are all there afterwards.",
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
