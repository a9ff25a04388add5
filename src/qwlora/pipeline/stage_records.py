"""Records of finished stages, in `stages.json`.

It has one line per record, with a checksum; if a line is damaged, its stage runs again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwlora import strict_json
from qwlora.atomic import write_text


@dataclass(frozen=True)
class Record:
    """Record of a finished stage: the key of its inputs, its results, SHA-256 of its files."""

    key: str
    seconds: float
    results: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def checksum(self, stage: str) -> str:
        """SHA-256 of the record together with the name of its stage."""
        as_read = json.loads(json.dumps([stage, asdict(self)]))
        content = json.dumps(as_read, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def read_records(file: Path) -> tuple[dict[str, Record], int]:
    """Records by stage, and the number of lines that cannot be read."""
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}, 0
    lines = [line.strip() for line in content.splitlines()]
    found = [_parse_record(line) for line in lines if line not in (b"{", b"}", b"")]
    return dict(entry for entry in found if entry is not None), found.count(None)


def write_records(file: Path, records: Mapping[str, Record]) -> None:
    """Replace the file."""
    write_text(file, records_text(records))


def records_text(records: Mapping[str, Record]) -> str:
    """The content of the file."""
    lines = []
    for stage, record in records.items():
        content = asdict(record) | {"sha256": record.checksum(stage)}
        lines.append(f"{strict_json.dumps(stage)}: {strict_json.dumps(content)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _parse_record(line: bytes) -> tuple[str, Record] | None:
    """The record in a line of stages.json; None if the line is damaged."""
    try:
        ((stage, content),) = json.loads(b"{" + line.removesuffix(b",") + b"}").items()
        checksum = content.pop("sha256")
        record = Record(**content)
        return (stage, record) if record.checksum(stage) == checksum else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
