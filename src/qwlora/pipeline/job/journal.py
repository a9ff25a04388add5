"""Changes of several files of a job that are made completely, even if the process is killed.

A change is decided first, then written to `.qwlora/journal.json`, then made, then the journal is
deleted. A process that is killed before the journal exists has changed nothing. If it is killed
later, the next command that reads or writes the job makes the whole change again: each part of it
can be repeated.

    {"command": ["rename", "first", "one"],
     "moves": [["simulation/old", ".qwlora/trash/0"],   in this order, each one only if the first
               ["adapters/first", "adapters/one"]],     path exists and the second does not
     "files": {"recipe.yaml": "name: ...",              written last, with this content
               ".qwlora/records/train/first.json": null}}   deleted

What is removed moves to the trash, which is emptied once the journal is deleted: as long as a
change may be repeated, its moves into the trash are known to be made. Paths are relative to the
job's directory. A journal that leads out of it is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qwlora.errors import DirectoryError
from qwlora.pipeline.job.output_path import as_directory_errors, lock_folder
from qwlora.pipeline.job.stage_records import read_records
from qwlora.system import strict_json
from qwlora.system.atomic import flush_folder, write_text
from qwlora.targets.proof.folder import current_proofs
from qwlora.targets.proof.readme import write_readme
from qwlora.targets.registry import TARGETS

JOURNAL, TRASH = "journal.json", "trash"


def make(
    job: Path,
    command: list[str | None],
    moves: Iterable[tuple[str, str]],
    removals: Iterable[str],
    files: Mapping[str, str | None],
) -> None:
    """Make a change, or leave it to the next command if this process is killed.

    The caller holds the job's lock.

    Args:
        command: what the user asked for; empty for a stage of a run.
        moves: from and to; nothing may be there but what is removed.
        removals: paths to delete before; they need not exist.
        files: content by path; None: delete it.
    """
    _empty_trash(job)
    removed = [path for path in removals if os.path.lexists(job / path)]
    trash = [[path, f".qwlora/{TRASH}/{number}"] for number, path in enumerate(removed)]
    change = {"command": command, "moves": [*trash, *map(list, moves)], "files": dict(files)}
    _check_inside(job, change)
    write_text(_journal(job), strict_json.dumps(change, indent=1) + "\n")
    finish_locked(job)


def finish(job: Path) -> None:
    """Make the rest of a change whose process was killed, if there is one."""
    if not is_pending(job):
        return
    if not all(os.access(folder, os.W_OK) for folder in (job, job / ".qwlora")):
        raise DirectoryError(
            f"{str(job)!r} holds a change that was interrupted ({JOURNAL}), and is not writable. "
            "Make it writable, so that the change can be finished"
        )
    with as_directory_errors(job), lock_folder(job / ".qwlora", job):
        finish_locked(job)


def finish_locked(job: Path) -> list[str | None]:
    """`finish` for a caller that holds the lock.

    Returns:
        The command of the change that was finished; empty if there was none.
    """
    if not is_pending(job):
        return []
    try:
        change = json.loads(_journal(job).read_text(encoding="utf-8"))
        command: list[str | None] = change["command"]
        _check_inside(job, change)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DirectoryError(
            f"{str(_journal(job))!r} is damaged ({error}): a change of the job was interrupted "
            "and cannot be finished. Delete the file, then look what is there: "
            f"qwlora adapters check {job}"
        ) from error
    for old, new in change["moves"]:
        if os.path.lexists(job / old) and not os.path.lexists(job / new):
            (job / new).parent.mkdir(parents=True, exist_ok=True)
            (job / old).rename(job / new)
            flush_folder((job / old).parent)
            flush_folder((job / new).parent)
    for name, text in change["files"].items():
        if text is None:
            (job / name).unlink(missing_ok=True)
        else:
            (job / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(job / name, text)
    if command:  # adapters changed
        _write_bundle_readmes(job)
    _journal(job).unlink()
    flush_folder(_journal(job).parent)
    _empty_trash(job)
    return command


def is_pending(job: Path) -> bool:
    """Whether a change was begun and is not finished."""
    return _journal(job).is_file()


def _journal(job: Path) -> Path:
    return job / ".qwlora" / JOURNAL


def _empty_trash(job: Path) -> None:
    if (job / ".qwlora" / TRASH).exists():
        shutil.rmtree(job / ".qwlora" / TRASH)


def _check_inside(job: Path, change: Mapping[str, Any]) -> None:
    """Check that no path of a change leads out of the job, by itself or through a link."""
    for path in (*(path for old, new in change["moves"] for path in (old, new)), *change["files"]):
        parts = PurePosixPath(path).parts
        is_inside = (job / path).parent.resolve().is_relative_to(job.resolve())
        if not parts or parts[0] == "/" or ".." in parts or not is_inside:
            raise DirectoryError(
                f"{path!r} leads out of the job's directory {str(job)!r}, so it is not changed. If "
                "a folder of the job is a link, replace it by what it points to"
            )


def _write_bundle_readmes(job: Path) -> None:
    """Write README.md of every bundle again: it lists the adapters that passed and are there."""
    records, _ = read_records(job)
    for target, known in TARGETS.items():
        bundle = job / "export" / target
        if known.has_base and bundle.is_dir():
            verified = {n for n in records if n.startswith(f"verify/{target}/") and records[n].key}
            proofs = current_proofs(bundle).items()
            passed = {name: p for name, p in proofs if f"verify/{target}/{name}" in verified}
            write_readme(bundle, passed)
