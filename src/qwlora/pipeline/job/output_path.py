"""Checks of an `--out` path, and the lock on a folder that is being written.

Nothing is written before `check_output` has accepted a path. `lock_folder` creates the folder and
returns the folders it created, so that a failed run can remove exactly those.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from qwlora.errors import DirectoryError
from qwlora.recipe import Recipe

_LONGEST_INSIDE = 250  # bytes that file names inside the folder may need
_ATTEMPTS = 100


def check_output(path: Path) -> bool:
    """Whether the folder `path` exists. If it does not, check that it can be created.

    Raises:
        DirectoryError: it is a file, a dangling link or a loop of links; its name or path is too
            long; its parent is a file or not writable.
    """
    try:
        os.stat(path)
        exists = True
    except (FileNotFoundError, NotADirectoryError):
        exists = False
    except OSError as error:
        raise _unusable(path, error) from error
    if exists and not path.is_dir():
        raise DirectoryError(f"{shown(path)} is a file; --out names a directory")
    try:
        os.stat(path / ("x" * _LONGEST_INSIDE))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise _unusable(path, error) from error
    if not exists:
        _check_parent(path)
    return exists


def check_outside_data(path: Path, recipe: Recipe) -> None:
    """Check that `path` is not inside the folder that a recipe reads its data from.

    Raises:
        DirectoryError: it is; the next run would read the job's files as data.
    """
    target = os.path.realpath(path)
    for data in (recipe.data, *recipe.texts().values()):
        folder = os.path.realpath(os.path.expanduser(data.source or ""))
        if data.source and os.path.isdir(folder) and os.path.commonpath([folder, target]) == folder:
            raise DirectoryError(
                f"{shown(path)} is inside the data folder {data.source!r} (data.source), so its "
                "own files would be read as data. Choose an --out outside of it."
            )


def lock_folder(folder: Path, name: str) -> tuple[IO[str], list[Path]]:
    """Create `folder`, open the file `name` in it and lock it; closing the file unlocks it.

    A process that gives up deletes its lock file while it holds the lock. So a lock is valid only
    if the locked file is still the one in the folder.

    Returns:
        The open lock file, and the folders that this call created, outermost first.

    Raises:
        DirectoryError: another process holds the lock. Folders created here are removed again.
    """
    made: list[Path] = []
    try:
        for _ in range(_ATTEMPTS):
            try:
                _make_folders(folder, made)
                file = (folder / name).open("a")
            except FileNotFoundError:  # removed by a process that gave up
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_in_place(file, folder / name):
                    return file, made
            except BlockingIOError:
                file.close()
                break
            except BaseException:
                file.close()
                raise
            file.close()
    except BaseException:
        remove_empty(made)
        raise
    remove_empty(made)
    raise DirectoryError(
        f"{shown(folder.parent)} is in use by another qwlora process; wait for it, or choose "
        "another --out"
    )


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove the empty ones among `folders`, last first."""
    for folder in reversed(list(folders)):
        with contextlib.suppress(OSError):
            folder.rmdir()


def shown(path: Path) -> str:
    """The path in quotes, shortened in the middle if it is very long."""
    text = str(path)
    return repr(text if len(text) <= 300 else f"{text[:60]}...{text[-20:]}")


def _make_folders(folder: Path, made: list[Path]) -> None:
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    for each in reversed(missing):
        try:
            each.mkdir()
        except FileExistsError:  # another process was faster
            if not each.is_dir():
                raise
        else:
            made.append(each)


def _is_in_place(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _check_parent(path: Path) -> None:
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.lexists(p))
    if nearest.is_symlink() and not nearest.exists():
        raise DirectoryError(
            f"{shown(path)} cannot be created: {shown(nearest)} is a link to "
            f"{os.readlink(nearest)!r}, which does not exist; choose another --out"
        )
    if not nearest.is_dir():
        raise DirectoryError(
            f"{shown(path)} cannot be created: {shown(nearest)} is a file; choose another --out"
        )
    if not os.access(nearest, os.W_OK):
        raise DirectoryError(
            f"{shown(path)} cannot be created: {shown(nearest)} is not writable; choose another "
            "--out"
        )


def _unusable(path: Path, error: OSError) -> DirectoryError:
    match error.errno:
        case errno.ENAMETOOLONG:
            longest = max(len(part.encode()) for part in path.absolute().parts)
            what = (
                f"the path has {len(str(path))} characters (longest name: {longest} bytes), too "
                "long for the file system"
            )
        case errno.ELOOP:
            what = "it is a loop of symbolic links"
        case _:
            what = error.strerror or str(error)
    return DirectoryError(f"{shown(path)} cannot be used: {what}; choose another --out")
