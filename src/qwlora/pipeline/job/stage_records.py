"""The stages of a job, the record of each, in `.qwlora/records/STAGE.json`, and whose a directory
is.

    key       of the inputs that the stage ran with; empty: it must run again
    seconds   that it took
    results   its part of results.json
    files     SHA-256 by path of each file that it wrote

A directory with records belongs to the job whose recipe is there, which may replace the files that
a record lists. A record has a checksum; a damaged one says only that its stage ran once, and
whatever is in its artifact counts as the job's.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qwlora.errors import DirectoryError
from qwlora.recipe.yaml_core import load_yaml
from qwlora.system import strict_json
from qwlora.system.regular_files import is_special

FOLDER = ".qwlora/records"
# what is in .qwlora/ before a job has written its recipe
_BEFORE_RECIPE = {"lock", "records", "digests.json", ".digests.json.part"}


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: `verb` or `verb/...`; unique.
        key: hash of everything the result depends on.
        adapter: name of the adapter that the stage works on, if any.
        artifact: the folder that the stage writes, relative to the job's directory.
        needs: names of the stages whose results it reads.
    """

    name: str
    key: str
    adapter: str | None = None
    artifact: str | None = None
    needs: tuple[str, ...] = ()

    @property
    def verb(self) -> str:
        """The command that runs the stage."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Record:
    """Record of a stage; see the module's docstring."""

    key: str
    seconds: float = 0.0
    results: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def text(self, stage: str) -> str:
        return sealed({"stage": stage, **asdict(self)})

    def outdated(self) -> Record:
        """The record once the stage must run again: its files remain the job's."""
        return Record("", files=self.files)


def record_path(stage: str) -> str:
    """The file of a stage's record, relative to the job's directory."""
    return f"{FOLDER}/{stage}.json"


def read_records(job: Path) -> tuple[dict[str, Record], list[str]]:
    """Records by stage, and the stages whose record is damaged."""
    folder = job / FOLDER
    files = {str(f.relative_to(folder).with_suffix("")): f for f in sorted(folder.rglob("*.json"))}
    records = {stage: stored_record(file, stage) for stage, file in files.items()}
    damaged = [stage for stage, record in records.items() if record is None]
    return {stage: record for stage, record in records.items() if record is not None}, damaged


def stored_record(file: Path, stage: str) -> Record | None:
    """The record of `stage` in `file`; None if it is missing or damaged."""
    content = unsealed(file)
    return Record(**content) if content and content.pop("stage", None) == stage else None


def sealed(content: dict[str, Any]) -> str:
    """JSON text of `content` with a checksum."""
    return strict_json.dumps({**content, "sha256": _checksum(content)}) + "\n"


def unsealed(file: Path) -> dict[str, Any] | None:
    """The content of a file that `sealed` made; None if it is missing or damaged."""
    if is_special(file):
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
        return content if content.pop("sha256") == _checksum(content) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _checksum(content: Any) -> str:
    as_read = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def read_owner(path: Path) -> tuple[str, str] | None:
    """Recipe name and model of the job in `path`; None if it is not a job directory."""
    if not (path / FOLDER).is_dir() or is_unclaimed(path):
        return None
    try:
        content = load_yaml((path / "recipe.yaml").read_text(encoding="utf-8"))
        return str(content["name"]), str(content["model"]["source"])
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, RecursionError) as error:
        raise DirectoryError(
            f"{str(path / 'recipe.yaml')!r} cannot be read, so it is unknown which job "
            f"{str(path)!r} belongs to. Restore it, or choose another --out."
        ) from error


def is_unclaimed(path: Path) -> bool:
    """Whether the folder `path` is empty, except for what a process leaves that is killed before it
    wrote the recipe."""
    inside, private = set(os.listdir(path)), path / ".qwlora"
    if inside - {private.name, ".recipe.yaml.part"}:
        return False
    if not private.is_dir():
        return not inside
    return set(os.listdir(private)) <= _BEFORE_RECIPE and not any((path / FOLDER).rglob("*.json"))
