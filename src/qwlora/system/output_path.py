"""Folders to write to: checks of an `--out` path, its errors, the lock, and new model folders.

A failed command removes the folders that it created, and no others.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from qwlora.errors import DirectoryError, file_being_read, is_out_of_space
from qwlora.system.atomic import move_into_place, remove_empty

_FULL_BYTES = 64 * 1024
_UNWRITABLE = (
    *(errno.EROFS, errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST),
)
# NFS without lockd, for example.
_LOCKS = "The file system cannot lock files; choose an --out on a local disk"
_DISK = "The disk or the connection to it failed; check it, or choose another --out"
_REMEDIES = {
    **dict.fromkeys(_UNWRITABLE, "Fix this or choose another --out"),
    **dict.fromkeys((errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS), _LOCKS),
    **dict.fromkeys((errno.EIO, errno.ESTALE), _DISK),
    errno.EFBIG: "The file exceeds `ulimit -f` or the file system's limit; raise the limit",
}
_LONGEST_INSIDE = 250  # bytes that file names inside the folder may need
_ATTEMPTS = 100


@contextlib.contextmanager
def as_directory_errors(path: Path) -> Iterator[None]:
    """Turn the various errors for a full disk or an unwritable path into a DirectoryError."""
    try:
        yield
    except DirectoryError:
        raise
    except Exception as error:
        # Native writers report a full disk in their own words, so the free space is checked too.
        # /proc has a size of 0, and is never full.
        nearest = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
        usage = shutil.disk_usage(nearest)
        is_full = usage.total and usage.free < _FULL_BYTES
        if is_out_of_space(error) or is_full:
            raise DirectoryError(
                f"{str(path)!r}: no space left on the disk. Nothing half-written was kept. Free "
                "some space and run again"
            ) from error
        # safetensors 0.8 writes in Rust: the number of an error is only in its text.
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = int(number[1]) if number else getattr(error, "errno", None)
        if file_being_read(error) is None and code in _REMEDIES:
            raise DirectoryError(
                f"{str(path)!r} cannot be written: {error}. {_REMEDIES[code]}"
            ) from error
        raise


def check_output(path: Path) -> bool:
    """Whether the folder `path` exists. If it does not, check that it can be created."""
    # The system refuses a path that is too long, or has a name that it cannot store.
    try:
        os.stat(path / ("x" * _LONGEST_INSIDE))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise DirectoryError(
            f"{shown(path)} cannot be used: {error.strerror}; choose another --out"
        ) from error
    if path.is_dir():
        return True
    if path.exists():
        raise DirectoryError(f"{shown(path)} is a file; --out names a directory")
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.lexists(p))
    if nearest.is_symlink() and not nearest.exists():
        reason = f"is a link to {os.readlink(nearest)!r}, which does not exist"
    elif not nearest.is_dir():
        reason = "is a file"
    elif not os.access(nearest, os.W_OK):
        reason = "is not writable"
    else:
        return False
    raise DirectoryError(
        f"{shown(path)} cannot be created: {shown(nearest)} {reason}; choose another --out"
    )


@contextlib.contextmanager
def lock_folder(folder: Path, protected: Path) -> Iterator[None]:
    """Create `folder` and lock the file `lock` in it. Afterwards, or if another process holds the
    lock, the folders that were created for it are removed again as far as they are empty. Messages
    name `protected`, which nobody else may write meanwhile."""
    created: list[Path] = []
    try:
        for _ in range(_ATTEMPTS):
            # A process that gives up removes these files and folders at any moment.
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as attempt:
                for missing in [p for p in (folder, *folder.parents) if not p.exists()][::-1]:
                    # Another process may be faster; then that one removes the folder.
                    with contextlib.suppress(FileExistsError):
                        missing.mkdir()
                        created.append(missing)
                file = attempt.enter_context((folder / "lock").open("a"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A process deletes its lock file while it holds the lock, so a lock counts only if
                # the locked file is still the one in the folder.
                if os.path.samestat(os.fstat(file.fileno()), (folder / "lock").stat()):
                    lock = attempt.pop_all()
                    break
        else:
            raise BlockingIOError
    except BaseException as error:
        remove_empty(created[::-1])
        if not isinstance(error, BlockingIOError):
            raise
        raise DirectoryError(
            f"{shown(protected)} is in use by another qwlora process; wait for it, or choose "
            "another --out"
        ) from error
    with lock:
        try:
            yield
        finally:
            remove_empty(created[::-1])


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write a model to. When the block ends without an error, it becomes
    `folder`, which must be new or empty. After an error, nothing half-written stays.
    """
    check_target(folder)
    folder = Path(os.path.realpath(folder))
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()
    # The name follows from the path of `folder`, so that the next command that writes it finds and
    # removes what a killed one left. A rename is atomic only within one file system.
    scratch = folder.with_name(f".qwlora-write-{digest[:16]}")
    with as_directory_errors(folder), lock_folder(scratch, folder):
        try:
            # Another process may have finished since the first check.
            check_target(folder)
            shutil.rmtree(scratch / "model", ignore_errors=True)
            (scratch / "model").mkdir()
            yield scratch / "model"
            move_into_place(scratch / "model", folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def check_target(folder: Path) -> None:
    """Check that a new model can take the place of `folder`; see `new_folder`."""
    if not check_output(folder):
        return
    reason = None
    if os.path.realpath(folder) == os.path.realpath("."):
        reason = "is the current directory, which the new model cannot replace"
    elif os.listdir(folder):
        reason = "is not empty"
    elif not all(os.access(f, os.W_OK) for f in (folder, Path(os.path.realpath(folder)).parent)):
        reason = "cannot be replaced: it or the folder above it is not writable"
    elif os.path.ismount(folder):
        reason = "is a mount point, which the new model cannot replace"
    if reason:
        raise DirectoryError(f"{shown(folder)} {reason}; choose another --out")


def shown(path: Path) -> str:
    """The path in quotes, shortened in the middle if it is very long."""
    text = str(path)
    return repr(text if len(text) <= 300 else f"{text[:60]}...{text[-20:]}")
