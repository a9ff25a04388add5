"""SHA-256 digests of the files of an artifact, stored in a JSON record in its folder.

    {"base_fingerprint": ..., "files": {"adapter_config.json": SHA-256, ..., "qwlora.json":
    SHA-256}}

The record is `qwlora.json` for an adapter, `base.json` for a base, and `simulation.json` for a
simulation. Its `files` has the SHA-256 of each file that is checked, by path relative to the
folder, and under its own name that of all its other fields. To accept an edited file, delete its
entry. A record may come from a stranger: entries that lead out of the folder, or to a link, a pipe
or a device, count as changed and are not opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwlora.errors import FingerprintError, QwloraWarning
from qwlora.system import strict_json
from qwlora.system.atomic import write_text
from qwlora.system.regular_files import is_inside, is_special

FILES = "files"


class UnverifiedWarning(QwloraWarning):
    """An artifact was read that has no digests, so changed files cannot be detected."""


def write(folder: Path, name: str, record: Mapping[str, Any], files: Iterable[str]) -> None:
    """Write `record` as `folder / name`, with the digests of `files` and of the record itself."""
    digests = {file: _file_digest(folder / file) for file in sorted(files)}
    write_text(folder / name, text({**record, FILES: digests}, name))


def text(record: Mapping[str, Any], name: str) -> str:
    """The text of a changed record with a new digest of its own; digests of files stay."""
    rest = {key: value for key, value in record.items() if key != FILES}
    digests = {**record[FILES], name: _record_digest(rest)}
    return strict_json.dumps({**rest, FILES: digests}, indent=1) + "\n"


def add(folder: Path, name: str, files: Iterable[str]) -> None:
    """Add the digests of more files to the record."""
    record = json.loads((folder / name).read_text())
    record[FILES] |= {file: _file_digest(folder / file) for file in files}
    write_text(folder / name, text(record, name))


def has_digests(folder: Path, name: str) -> bool:
    """Whether the record has digests, so that `check` can detect changed files."""
    return FILES in read(folder / name)


def listed_files(folder: Path, name: str) -> list[str]:
    """The files with a digest in the record; empty if it has no digests."""
    listed = read(folder / name).get(FILES, {})
    return sorted(listed) if isinstance(listed, dict) else []


def check(
    folder: Path, name: str, what: str, remedy: str, only: Iterable[str] | None = None
) -> None:
    """Compare the files of `folder` with the digests in its record `name`.

    Args:
        what, remedy: the artifact and how to create it again, for messages.
        only: the files to check, in addition to the record; default: all listed files.

    Raises:
        FingerprintError: files are missing or changed, or the record has no digests; the message
            lists them.

    Warns:
        UnverifiedWarning: there is no record.
    """
    if not (folder / name).exists():
        warnings.warn(
            f"{what} is unverified: {name} is missing (other tools do not write it), so a changed "
            "file cannot be noticed",
            UnverifiedWarning,
            stacklevel=3,
        )
    elif changed := changed_files(folder, name, only):
        them = "it" if len(changed) == 1 else "them"
        raise FingerprintError(
            f"{what}: {', '.join(changed)} changed after saving (SHA-256 differs from {name}). "
            f"Copy {them} again, or {remedy}. To keep an edit that you made yourself, delete "
            f'the entry under "{FILES}" in {name}: that file is then no longer checked'
        )


def changed_files(folder: Path, name: str, only: Iterable[str] | None = None) -> list[str]:
    """The listed files that are missing, differ from their digests, or are not in the folder."""
    if not (folder / name).exists():
        return []
    record = read(folder / name)
    listed = record.pop(FILES, None)
    if not isinstance(listed, dict):
        return [name]
    checked = listed if only is None else {*only, name} & listed.keys()
    changed = list[str]()
    for file in sorted(checked):
        # A record may come from a stranger: reading a pipe or a device may never end.
        if not is_inside(folder, file):
            changed.append(f"{file!r} (not a regular file in this folder; it was not opened)")
            continue
        digest = _record_digest(record) if file == name else _file_digest(folder / file)
        # A file that cannot be read has the digest None, which must not match a null.
        if digest is None or digest != listed[file]:
            is_there = file == name or os.path.exists(folder / file)
            changed.append(file if is_there else f"{file} (missing)")
    return changed


def read(path: Path) -> dict[str, Any]:
    """A record; empty if there is none, or it cannot be read."""
    if is_special(path):
        return {}
    try:
        record = json.loads(path.read_text())
    # Python's JSON parser raises RecursionError for deeply nested lists.
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _record_digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):  # a name may be anything
        return None
