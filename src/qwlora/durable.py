"""Files and folders that appear whole or not at all, even if the machine loses power.

A rename alone is not enough: after a power cut a file system may show the new name with no content.
So the content is flushed to disk first (fsync), then renamed, then the rename itself is flushed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file, replacing what was there.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_text(text, encoding="utf-8")
        move_into_place(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def move_into_place(scratch: Path, target: Path) -> None:
    """Flush a file or a folder to disk and rename it to `target`, on the same file system.

    A file replaces the file at `target`. A folder needs `target` to be absent or an empty folder.

    Raises:
        OSError: flushing or renaming failed, for example because the disk is full.
    """
    if scratch.is_dir():
        for folder, _, names in os.walk(scratch):
            for name in names:
                _flush_file(Path(folder, name))
            _flush_folder(Path(folder))
    else:
        _flush_file(scratch)
    scratch.replace(target)
    _flush_folder(target.parent)


def _flush_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Flush a folder's list of names; some network file systems cannot, and keep it safe anyway."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
