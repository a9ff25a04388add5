"""The output folder of a merge: checked and locked before the work, replaced when it is complete.

The model is written to `FOLDER/.qwlora-merge/model`, next to the lock, and then replaces the
folder. The next merge into the same folder removes what a killed merge left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qwlora.atomic import move_into_place
from qwlora.errors import DirectoryError
from qwlora.pipeline.directory import explained
from qwlora.pipeline.output_path import check_output, lock_folder, remove_empty, shown

_PRIVATE = ".qwlora-merge"
_PRIVATE_FILES = {"lock", "model"}


def check_target(folder: Path) -> None:
    """Check that a merged model can be written to `folder`.

    Raises:
        DirectoryError: it is a file, is not empty, is the current directory or a mount point, or
            cannot be created.
    """
    with explained(folder):
        if not check_output(folder):
            return
        if os.path.realpath(folder) == os.path.realpath("."):
            raise DirectoryError(
                f"{shown(folder)} is the current directory, which the merged model cannot replace; "
                "choose a new folder with --out"
            )
        if set(os.listdir(folder)) - {_PRIVATE} or _holds_more_than_ours(folder / _PRIVATE):
            raise DirectoryError(f"{shown(folder)} is not empty; choose another --out")
        for needed in (folder, Path(os.path.realpath(folder)).parent):
            if not os.access(needed, os.W_OK):
                raise DirectoryError(f"{shown(needed)} is not writable; choose another --out")
        if os.path.ismount(folder):
            raise DirectoryError(
                f"{shown(folder)} is a mount point, which the merged model cannot replace; "
                "choose a new folder in it with --out"
            )


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write to. When the block ends without an error, it becomes `folder`.

    Raises:
        DirectoryError: see `check_target`; or another merge writes there, or the disk is full.
            Nothing half-written stays; only what this call created is removed.
    """
    check_target(folder)
    folder = Path(os.path.realpath(folder))
    with explained(folder):
        lock, made = lock_folder(folder / _PRIVATE, "lock")
    part: Path | None = None
    try:
        with explained(folder):
            check_target(folder)  # another merge may have finished since the check
            scratch = folder / _PRIVATE / "model"
            shutil.rmtree(scratch, ignore_errors=True)  # left by a merge that was killed
            scratch.mkdir()
            yield scratch
            part = Path(tempfile.mkdtemp(prefix=f"{_PRIVATE}-", dir=folder.parent))
            part.chmod(scratch.stat().st_mode)  # mkdtemp makes it private to the user
            scratch.rename(part)
            shutil.rmtree(folder / _PRIVATE)
            move_into_place(part, folder)
    finally:
        shutil.rmtree(folder / _PRIVATE, ignore_errors=True)
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
        remove_empty(made)
        lock.close()


def _holds_more_than_ours(private: Path) -> bool:
    return private.is_dir() and bool(set(os.listdir(private)) - _PRIVATE_FILES)
