"""Which files in a stranger's folder are safe to open. Reading a pipe or a device may never end. A
link may lead to a private file of the user, which would then be copied or uploaded."""

from __future__ import annotations

import os
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISREG

from qwlora.errors import SourceError


def is_special(path: Path) -> bool:
    """Whether a path leads to a pipe, a socket or a device."""
    return os.path.exists(path) and not path.is_file() and not path.is_dir()


def check_readable(path: Path) -> None:
    """Refuse a special file (`is_special`), and a folder that contains one, with SourceError."""
    # Links are followed: a user's files and those of the hub's cache may be links.
    for entry in (path, *(path.iterdir() if path.is_dir() else ())):
        if is_special(entry):
            raise SourceError(
                f"{str(entry)!r} is a pipe, a socket or a device, whose content may never end. "
                "Save its content as a regular file"
            )


def check_plain(folder: Path) -> None:
    """Refuse links, pipes, sockets and devices in a folder and below it, with SourceError."""
    for parent, folders, files in os.walk(folder):
        # Nothing reads hidden entries of the folder itself. `os.walk` skips what is removed here.
        if parent == str(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            files = [name for name in files if not name.startswith(".")]
        for path in (os.path.join(parent, name) for name in (*folders, *files)):
            mode = os.lstat(path).st_mode
            if not S_ISDIR(mode) and not S_ISREG(mode):
                kind = "a link" if S_ISLNK(mode) else "not a regular file"
                raise SourceError(
                    f"{path!r} is {kind}; only regular files are accepted here. Copy the folder "
                    "with files in place of links, for example with `cp -rL`"
                )


def is_inside(folder: Path, name: str) -> bool:
    """Whether `name` is a relative path without `..` that leads to no link or special file; it need
    not exist. Links of the hub's cache are accepted."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        return False
    # A zero byte, or a character that no file's name can have, is a ValueError.
    try:
        root, real = folder.resolve(), (folder / path).resolve()
    except ValueError:
        return False
    # huggingface_hub links `snapshots/REVISION/FILE` to `blobs/HASH`.
    cached = (p.parent / "blobs" for p in root.parents if p.name == "snapshots")
    return (real == root / path or real.parent in cached) and not is_special(real)
