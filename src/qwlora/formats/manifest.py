"""SHA-256 digests of the files in an artifact's folder, kept in the folder's own record.

    {"base_fingerprint": ..., "files": {"adapter_config.json": SHA-256, ..., "qwlora.json": SHA-256}}

An artifact has one JSON record: `qwlora.json` of an adapter, `base.json` of a base,
`simulation.json` of a simulation. Its `files` lists what was written together with it, by path
relative to the folder; the entry of the record itself is the digest of all its other fields.
Files that are not listed (README.md, notes) are never looked at. Deleting an entry from `files`
accepts an edit: that file is no longer checked.

A folder without a record, or with one that lists no digests (other tools, earlier versions),
cannot be checked; `check` warns that it is unverified.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwlora import strict_json
from qwlora.atomic import write_text
from qwlora.errors import FingerprintError

FILES = "files"


class UnverifiedWarning(UserWarning):
    """An artifact was read whose files have no digests."""


def write(folder: Path, name: str, record: Mapping[str, Any], files: Iterable[str]) -> None:
    """Write `record` as `folder / name`, with the digests of `files` and its own."""
    digests = {file: _file_digest(folder / file) for file in sorted(files)}
    _write(folder / name, {**record, FILES: {**digests, name: _record_digest(record)}})


def add(folder: Path, name: str, files: Iterable[str]) -> None:
    """List more files of the folder in its record."""
    record = json.loads((folder / name).read_text())
    record[FILES] |= {file: _file_digest(folder / file) for file in files}
    _write(folder / name, record)


def has_digests(folder: Path, name: str) -> bool:
    """Whether the record of `folder` lists digests, so that `check` can find a changed file."""
    return FILES in _read(folder / name)


def check(
    folder: Path, name: str, what: str, remedy: str, only: Iterable[str] | None = None
) -> None:
    """Compare the files of `folder` with the digests in its record `name`.

    A record that cannot be read counts as one without digests: its own reader reports it.

    Args:
        what: the artifact, as messages call it.
        remedy: how to make the artifact again.
        only: the files to look at, besides the record; all that are listed by default.

    Raises:
        FingerprintError: a file is missing or changed; all such files are named.

    Warns:
        UnverifiedWarning: there are no digests.
    """
    if not has_digests(folder, name):
        why = (
            f"lists no digests (an earlier version wrote it). To have its files checked, {remedy}"
            if (folder / name).exists()
            else "is missing (other tools do not write it), so a changed file cannot be noticed"
        )
        warnings.warn(
            f"{what} is unverified: {name} {why}",
            UnverifiedWarning,
            stacklevel=3,
        )
        return
    if changed := changed_files(folder, name, only):
        them = "it" if len(changed) == 1 else "them"
        raise FingerprintError(
            f"{what}: {', '.join(changed)} changed after saving (SHA-256 differs from {name}). "
            f"Copy {them} again, or {remedy}. To keep an edit that you made yourself, delete "
            f'the entry under "{FILES}" in {name}: that file is then no longer checked'
        )


def changed_files(folder: Path, name: str, only: Iterable[str] | None = None) -> list[str]:
    """Listed files that are missing or differ from their digests; none without digests."""
    record = _read(folder / name)
    listed = record.pop(FILES, {})
    if not isinstance(listed, dict):
        return [name]
    wanted = listed if only is None else {*only, name} & listed.keys()
    return [
        file if file == name or (folder / file).exists() else f"{file} (missing)"
        for file in sorted(wanted)
        if listed[file] != (_record_digest(record) if file == name else _file_digest(folder / file))
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, record: Mapping[str, Any]) -> None:
    write_text(path, strict_json.dumps(record, indent=1) + "\n")


def _record_digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
