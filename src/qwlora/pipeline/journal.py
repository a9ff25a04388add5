"""Changes of several files of a job that are made completely, even if the process is killed.

A change is decided first, then written to `.qwlora/journal.json`, then made, then the journal is
deleted. A process that is killed before the journal exists has changed nothing. If it is killed
later, the next command that reads or writes the job makes the whole change again: each part of it
can be repeated.

    {"command": ["rename", "first", "one"],
     "moves": [["adapters/first", "adapters/one"]],     renamed, if the first path still exists
     "removals": ["simulation/old"],                    deleted, if they still exist
     "files": {"recipe.yaml": "name: ..."}}             written last, with this content

Paths are relative to the job's directory. A journal that leads out of it is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from qwlora import strict_json
from qwlora.atomic import flush_folder, write_text
from qwlora.errors import DirectoryError
from qwlora.export.proof.folder import current_proofs
from qwlora.export.proof.readme import write_readme
from qwlora.export.registry import TARGETS
from qwlora.export.target import BundleTarget
from qwlora.pipeline.directory_errors import as_directory_errors
from qwlora.pipeline.output_path import lock_folder
from qwlora.pipeline.stage_records import read_records

JOURNAL = "journal.json"


@dataclass(frozen=True)
class Change:
    """What to move, delete and write. No path may be in more than one of these."""

    command: list[str | None]
    moves: list[list[str]] = field(default_factory=list)
    removals: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def paths(self) -> list[str]:
        """All paths, relative to the job's directory."""
        return [*(path for pair in self.moves for path in pair), *self.removals, *self.files]


def make(job: Path, change: Change) -> None:
    """Make a change, or leave it to the next command if this process is killed.

    The caller holds the job's lock.

    Raises:
        DirectoryError: a path leads out of the job. Nothing was changed.
        OSError: the disk is full, or a folder cannot be written.
    """
    _check_inside(job, change)
    write_text(_journal(job), strict_json.dumps(asdict(change), indent=1) + "\n")
    finish_locked(job)


def finish(job: Path) -> None:
    """Make the rest of a change whose process was killed, if there is one.

    Raises:
        DirectoryError: another process holds the job's lock; the job is read-only; or the journal
            is damaged.
    """
    if not _journal(job).is_file():
        return
    if not all(os.access(folder, os.W_OK) for folder in (job, job / ".qwlora")):
        raise DirectoryError(
            f"{str(job)!r} holds a change that was interrupted ({_journal(job).name}), and is not "
            "writable. Make it writable, so that the change can be finished"
        )
    with as_directory_errors(job):
        lock, _ = lock_folder(job / ".qwlora", "lock")
        with lock:
            finish_locked(job)


def finish_locked(job: Path) -> list[str | None]:
    """`finish` for a caller that holds the lock.

    Returns:
        The command of the change that was finished; empty if there was none.
    """
    if not _journal(job).is_file():
        return []
    change = _read(job)
    for old, new in change.moves:
        if os.path.lexists(job / old):
            (job / new).parent.mkdir(parents=True, exist_ok=True)
            (job / old).rename(job / new)
            flush_folder((job / old).parent)
            flush_folder((job / new).parent)
    for path in change.removals:
        if (job / path).is_dir():
            shutil.rmtree(job / path)
        else:
            (job / path).unlink(missing_ok=True)
    for name, text in change.files.items():
        write_text(job / name, text)
    _write_bundle_readmes(job)
    _journal(job).unlink()
    flush_folder(_journal(job).parent)
    return change.command


def _journal(job: Path) -> Path:
    return job / ".qwlora" / JOURNAL


def _read(job: Path) -> Change:
    try:
        change = Change(**json.loads(_journal(job).read_text(encoding="utf-8")))
        _check_inside(job, change)
        return change
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DirectoryError(
            f"{str(_journal(job))!r} is damaged ({error}): a change of the job was interrupted "
            "and cannot be finished. Delete the file, then look what is there: "
            f"qwlora adapters check {job}"
        ) from error


def _check_inside(job: Path, change: Change) -> None:
    """Check that no path leads out of the job, by itself or through a link."""
    root = job.resolve()
    for path in change.paths():
        parts = PurePosixPath(path).parts
        folder = (job / path).parent.resolve()
        if not parts or parts[0] == "/" or ".." in parts or not folder.is_relative_to(root):
            raise DirectoryError(
                f"{path!r} leads out of the job's directory {str(job)!r}, so it is not changed. If "
                "a folder of the job is a link, replace it by what it points to"
            )


def _write_bundle_readmes(job: Path) -> None:
    """Write README.md of every bundle again: it lists the adapters that passed and are there."""
    records, _ = read_records(job / ".qwlora" / "stages.json")
    for target, kind in TARGETS.items():
        bundle = job / "export" / target
        if isinstance(kind, BundleTarget) and bundle.is_dir():
            passed = {
                name: proof
                for name, proof in current_proofs(bundle).items()
                if f"verify/{target}/{name}" in records
            }
            write_readme(bundle, passed)
