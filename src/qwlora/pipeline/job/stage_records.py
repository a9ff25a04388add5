"""The record of each stage, in `.qwlora/records/STAGE.json`.

    key       of the inputs that the stage ran with; empty: it must run again
    seconds   that it took
    results   its part of results.json
    files     SHA-256 by path of each file that it wrote

A file is the job's, and may be replaced, if a record lists it. A record has a checksum; a damaged
one says only that its stage ran once, and whatever is in its artifact counts as the job's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwlora.system import strict_json

FOLDER = ".qwlora/records"


@dataclass(frozen=True)
class Record:
    """Record of a stage; see the module's docstring."""

    key: str
    seconds: float = 0.0
    results: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def text(self, stage: str) -> str:
        """The content of its file."""
        content = {"stage": stage, **asdict(self)}
        return strict_json.dumps({**content, "sha256": _checksum(content)}) + "\n"

    def outdated(self) -> Record:
        """The record once the stage must run again: its files remain the job's."""
        return Record("", files=self.files)


def record_path(stage: str) -> str:
    """The file of a stage's record, relative to the job's directory."""
    return f"{FOLDER}/{stage}.json"


def read_records(job: Path) -> tuple[dict[str, Record], list[str]]:
    """Records by stage, and the stages whose record is damaged."""
    records, damaged, folder = {}, [], job / FOLDER
    for file in sorted(folder.rglob("*.json")):
        stage = str(file.relative_to(folder).with_suffix(""))
        if (record := read_record(file, stage)) is None:
            damaged.append(stage)
        else:
            records[stage] = record
    return records, damaged


def read_record(file: Path, stage: str) -> Record | None:
    """The record of `stage` in `file`; None if it is missing or damaged."""
    try:
        content = json.loads(file.read_bytes())
        checksum = content.pop("sha256")
        if content["stage"] != stage or _checksum(content) != checksum:
            return None
        del content["stage"]
        return Record(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _checksum(content: Any) -> str:
    as_read = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()
