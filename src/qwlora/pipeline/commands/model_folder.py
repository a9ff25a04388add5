"""The output folder of `merge` and `base import`: checked and locked first, replaced at the end.

The model is written next to FOLDER, to `.qwlora-write-HASH` (of FOLDER's path), which then replaces
the folder. Who holds the lock on this scratch folder writes; it moves with the folder. The next
command that writes the same folder removes what a killed one left.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qwlora.errors import DirectoryError
from qwlora.pipeline.job.output_path import (
    as_directory_errors,
    check_output,
    make_folders,
    remove_empty,
    shown,
)
from qwlora.system.atomic import move_into_place

PREFIX = ".qwlora-write-"


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
        if os.listdir(folder):
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
    folder, made = Path(os.path.realpath(folder)), list[Path]()
    # nobody else has a name with this hash, so what is there is ours
    scratch = folder.with_name(f"{PREFIX}{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}")
    with as_directory_errors(folder), contextlib.ExitStack() as stack:
        stack.callback(remove_empty, made)
        try:
            make_folders(scratch.parent, made)
            scratch.mkdir(exist_ok=True)
            lock = os.open(scratch, os.O_RDONLY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(lock), scratch.stat())
        except (BlockingIOError, FileNotFoundError):
            is_ours = False  # another process writes, has just finished, or gave up
        if not is_ours:
            raise DirectoryError(
                f"{shown(folder)} is in use by another qwlora process; wait for it, or choose "
                "another --out"
            )
        try:
            check_target(folder)  # another process may have finished since the check
            for part in scratch.iterdir():  # of a killed command
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            yield scratch
            move_into_place(scratch, folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
