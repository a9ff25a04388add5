"""Paths from recipes and the command line."""

from __future__ import annotations

import contextlib
from pathlib import Path

from qwlora.errors import SourceError


def user_path(text: str) -> Path:
    """The path `text`, with `~` and `~user` expanded. It need not exist.

    Raises:
        SourceError: there is no such user, or no file system can hold such a path (too long, or
            with a null byte).
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise SourceError(f"{text!r}: the home directory of that user is not known") from error
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.stat()
    except (OSError, ValueError) as error:
        shown = text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"{shown!r} is not a path that can be used: {reason}") from error
    return path
