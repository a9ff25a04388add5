"""The output directory of one job.

    DIR/recipe.yaml            the recipe, resolved
    DIR/base/                  the frozen base
    DIR/base_simulation/       encodings of the base's activations (workflow qwa-lora)
    DIR/adapters/NAME/         a PEFT adapter; with learned activation ranges beside it, if it has any
    DIR/simulation/NAME/       encodings and placement, and the adapter in the factors that they are of
    DIR/export/TARGET/NAME/    files for a runtime
    DIR/results.json           what was measured (see docs/results.md)
    DIR/.qwlora/               the stages' records, checkpoints, the lock

An artifact is made in a scratch folder and renamed into place, so that what is there is whole. A stage's record is written after its artifact.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qwlora.errors import DirectoryError
from qwlora.recipe import Recipe

RESULTS_FORMAT = 1
_FULL_BYTES = 64 * 1024


@dataclass(frozen=True)
class Record:
    """What a finished stage leaves behind: the key of its inputs, what it measured, and the files of its artifact with their SHA-256."""

    key: str
    seconds: float
    results: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


class Directory:
    """One job's directory; use `open`."""

    def __init__(self, path: Path):
        self.path = path
        self.private = path / ".qwlora"
        self.records: dict[str, Record] = {}

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, recipe: Recipe) -> Iterator[Directory]:
        """Claim `path` for `recipe`; made if it is not there, and removed again if nothing was finished in it, not even a part of a stage.

        Raises:
            DirectoryError: it belongs to another recipe or to something else, is in use, or cannot be written.
        """
        directory = cls(path)
        directory.check_owner(recipe)
        existed = path.exists()
        with explained(path):
            directory.private.mkdir(parents=True, exist_ok=True)
            lock = (directory.private / "lock").open("w")
        try:
            _lock(lock, path)
            with explained(path):
                directory._read_records()
                write_text(
                    path / "recipe.yaml",
                    yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=150),
                )
                yield directory
        finally:
            lock.close()
            if not existed and not directory.records and not directory._has_work():
                shutil.rmtree(path, ignore_errors=True)

    def check_owner(self, recipe: Recipe) -> None:
        """See that the directory is free, or belongs to this job: a recipe of the same name and model.

        Raises:
            DirectoryError: it belongs to another recipe, or holds something else.
        """
        with explained(self.path):
            if not self.path.exists():
                parent = next(p for p in self.path.absolute().parents if p.exists())
                if not os.access(parent, os.W_OK):
                    raise DirectoryError(
                        f"{str(self.path)!r} cannot be made: {str(parent)!r} is not writable"
                    )
                return
            if not self.path.is_dir():
                raise DirectoryError(f"{str(self.path)!r} is a file; --out names a directory")
            if not os.access(self.path, os.W_OK):
                raise DirectoryError(f"{str(self.path)!r} is not writable; choose another --out")
            inside = [p for p in self.path.iterdir() if p != self.private]
            if not inside:
                return
            try:
                owner = yaml.safe_load((self.path / "recipe.yaml").read_text())
                name, source = owner["name"], owner["model"]["source"]
            except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
                raise DirectoryError(
                    f"{str(self.path)!r} is not empty and was not made by qwlora; choose another --out"
                ) from error
        if (name, source) != (recipe.name, recipe.model.source):
            raise DirectoryError(
                f"{str(self.path)!r} was made by another recipe ({name!r} on {source}), not by {recipe.name!r} on {recipe.model.source}; "
                "choose another --out, or delete it"
            )

    def is_current(self, stage: str, key: str) -> bool:
        """Whether `stage` is finished with these inputs and its files are as it left them."""
        record = self.records.get(stage)
        return (
            record is not None
            and record.key == key
            and all(_digest(self.path / file) == digest for file, digest in record.files.items())
        )

    @classmethod
    def peek(cls, path: Path, recipe: Recipe) -> Directory:
        """Look at the records of `path` without claiming it; see `check_owner` for the errors."""
        cls(path).check_owner(recipe)
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> Directory:
        """The records of `path`, whoever owns it, none if no job ran there; nothing is claimed or written."""
        directory = cls(path)
        directory._read_records()
        return directory

    def missing_adapters(self) -> list[str]:
        """Adapters of the job that were trained here and whose folders are gone."""
        trained = [
            stage.removeprefix("train/") for stage in self.records if stage.startswith("train/")
        ]
        return [
            name
            for name in trained
            if not (self.path / "adapters" / name / "adapter_config.json").is_file()
        ]

    def forget(self, keep: set[str]) -> None:
        """Drop the records of stages that the recipe no longer has; their files stay."""
        self.records = {stage: record for stage, record in self.records.items() if stage in keep}

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder, gone afterwards unless it was committed."""
        folder = self.private / "scratch"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(
        self,
        stage: str,
        record: Record,
        scratch: Path,
        artifact: str | None,
        dependents: Collection[str],
    ) -> None:
        """Put the scratch folder in the artifact's place and record the stage; `dependents` were made from its old result, and are forgotten."""
        for name in (stage, *dependents):
            self.records.pop(name, None)
        self._write_records()
        files = {}
        if artifact is not None:
            target = self.path / artifact
            files = {
                str(Path(artifact) / p.relative_to(scratch)): _digest(p) or ""
                for p in sorted(scratch.rglob("*"))
                if p.is_file()
            }
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch.rename(target)
        self.records[stage] = Record(record.key, record.seconds, record.results, files)
        self._write_records()

    def work(self, stage: str, key: str) -> Path:
        """Folder for what a stage must find again after an interruption; one for each key."""
        return self.private / "work" / f"{stage.replace('/', '-')}-{key[:16]}"

    def drop_work(self, stage: str) -> None:
        """Delete the work folders of `stage`, whatever their key."""
        for folder in (self.private / "work").glob(f"{stage.replace('/', '-')}-{'?' * 16}"):
            shutil.rmtree(folder)

    def _has_work(self) -> bool:
        return any(file.is_file() for file in (self.private / "work").rglob("*"))

    def _read_records(self) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            content = json.loads((self.private / "stages.json").read_text())
            self.records = {stage: Record(**record) for stage, record in content.items()}

    def _write_records(self) -> None:
        write_text(
            self.private / "stages.json",
            json.dumps({s: asdict(r) for s, r in self.records.items()}, indent=1),
        )


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_text(text)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _lock(file: Any, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DirectoryError(
            f"{str(path)!r} is in use by another qwlora process; wait for it, or choose another --out"
        ) from error


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's and the writers' ways to say "cannot be written" into one error."""
    try:
        yield
    except DirectoryError:
        raise
    except Exception as error:
        # writers in other languages report a full disk in words of their own, so the disk is asked too
        if (
            getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            or "No space left" in str(error)
            or _free_bytes(path) < _FULL_BYTES
        ):
            raise DirectoryError(
                f"{str(path)!r}: no space left on the disk. Nothing half-written was kept; free some space and run again"
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError) or getattr(
            error, "errno", None
        ) in (errno.EROFS, errno.EBUSY):
            raise DirectoryError(f"{str(path)!r} cannot be written: {error}") from error
        raise


def _free_bytes(path: Path) -> float:
    usage = shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists()))
    return usage.free if usage.total else float("inf")  # /proc and its like have no size


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
