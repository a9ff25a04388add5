"""Errors of a job directory that cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qwlora.errors import DirectoryError, file_being_read, is_out_of_space

_FULL_BYTES = 64 * 1024


@contextlib.contextmanager
def as_directory_errors(path: Path) -> Iterator[None]:
    """Turn the various errors for a full disk or an unwritable path into a DirectoryError."""
    try:
        yield
    except DirectoryError:
        raise
    except Exception as error:
        # Native writers report a full disk in their own words, so the free space is checked too.
        if is_out_of_space(error) or _free_bytes(path) < _FULL_BYTES:
            raise DirectoryError(
                f"{str(path)!r}: no space left on the disk. Nothing half-written was kept. Free "
                "some space and run again"
            ) from error
        if file_being_read(error) is not None:
            raise
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError) or getattr(
            error, "errno", None
        ) in (errno.EROFS, errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY, errno.ENAMETOOLONG):
            raise DirectoryError(
                f"{str(path)!r} cannot be written: {error}. Fix this or choose another --out"
            ) from error
        raise


def _free_bytes(path: Path) -> float:
    usage = shutil.disk_usage(
        next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    )
    return usage.free if usage.total else float("inf")  # file systems like /proc have no size
