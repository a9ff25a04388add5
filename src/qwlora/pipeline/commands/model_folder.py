"""The output folder of `merge` and `base import`: checked and locked first, replaced at the end.

The model is written to `FOLDER/.qwlora-write/model`, next to the lock. It is then moved next to
FOLDER, as `.qwlora-write-HASH` (of FOLDER's path), and replaces the folder. The next command that
writes the same folder removes what a killed one left.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qwlora.atomic import move_into_place
from qwlora.errors import DirectoryError
from qwlora.pipeline.job.output_path import (
    as_directory_errors,
    check_output,
    lock_folder,
    remove_empty,
    shown,
)

_PRIVATE = ".qwlora-write"
_PRIVATE_FILES = {"lock", "model"}


def check_target(folder: Path) -> None:
    """Check that a model can be written to `folder`.

    Raises:
        DirectoryError: it is a file, is not empty, is the current directory or a mount point, or
            cannot be created.
    """
    with as_directory_errors(folder):
        if not check_output(folder):
            return
        if os.path.realpath(folder) == os.path.realpath("."):
            raise DirectoryError(
                f"{shown(folder)} is the current directory, which the new model cannot replace; "
                "choose a new folder with --out"
            )
        private = folder / _PRIVATE
        others = set(os.listdir(private)) - _PRIVATE_FILES if private.is_dir() else set()
        if others or set(os.listdir(folder)) - {_PRIVATE}:
            raise DirectoryError(f"{shown(folder)} is not empty; choose another --out")
        for needed in (folder, Path(os.path.realpath(folder)).parent):
            if not os.access(needed, os.W_OK):
                raise DirectoryError(f"{shown(needed)} is not writable; choose another --out")
        if os.path.ismount(folder):
            raise DirectoryError(
                f"{shown(folder)} is a mount point, which the new model cannot replace; "
                "choose a new folder in it with --out"
            )


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write to. When the block ends without an error, it becomes `folder`.

    Raises:
        DirectoryError: see `check_target`; or another process writes there, or the disk is full.
            Nothing half-written stays; only what this call created is removed.
    """
    check_target(folder)
    folder = Path(os.path.realpath(folder))
    private, scratch = folder / _PRIVATE, folder / _PRIVATE / "model"
    # nobody else has a name with this hash, so what is there is ours
    part = folder.with_name(f"{_PRIVATE}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}")
    with as_directory_errors(folder):
        lock, made = lock_folder(private, "lock")
    ours, scratch_lock = [private], -1
    try:
        with as_directory_errors(folder):
            check_target(folder)  # another process may have finished since the check
            _remove_of_killed_command(part)
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            # the lock in `private` is gone before the model is in place; this one moves with it
            scratch_lock = os.open(scratch, os.O_RDONLY)
            fcntl.flock(scratch_lock, fcntl.LOCK_EX)
            yield scratch
            scratch.rename(part)
            ours = [part, private]
            shutil.rmtree(private)
            ours = [part]
            move_into_place(part, folder)
            ours = []
    finally:
        for each in ours:
            shutil.rmtree(each, ignore_errors=True)
        remove_empty(made)
        lock.close()
        if scratch_lock >= 0:
            os.close(scratch_lock)


def _remove_of_killed_command(part: Path) -> None:
    """Remove a model that a killed command left on its way into place.

    Raises:
        DirectoryError: the command is not dead, but about to finish.
    """
    try:
        descriptor = os.open(part, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(part, ignore_errors=True)
    except BlockingIOError as error:
        raise DirectoryError(
            f"{shown(part)} is in use by another qwlora process; wait for it, or choose another "
            "--out"
        ) from error
    finally:
        os.close(descriptor)
