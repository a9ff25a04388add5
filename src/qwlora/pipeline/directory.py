"""The output directory of one job.

    DIR/recipe.yaml            the recipe, resolved
    DIR/base/                  the frozen base
    DIR/base_simulation/       encodings of the base's activations (workflow qwa-lora)
    DIR/adapters/NAME/         a PEFT adapter
    DIR/simulation/NAME/       encodings, placement, and the adapter as it was calibrated
    DIR/simulation/_base/      the same of a zero adapter (target onnx)
    DIR/export/TARGET/NAME/    files for a runtime
    DIR/results.json           measurements (see docs/results.md)
    DIR/report.html            the same for people
    DIR/.qwlora/               ownership marker, records of stages, checkpoints, lock

Artifacts are written to a scratch folder and renamed into place, so they are never incomplete. A
stage's record is written after its artifact. Both are flushed to disk before the rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwlora.atomic import move_into_place, write_text
from qwlora.errors import DirectoryError, RecipeError
from qwlora.export.proof.folder import RECORD
from qwlora.formats import manifest
from qwlora.formats.card_mark import is_users_card, text_of
from qwlora.messages import listed
from qwlora.pipeline import journal
from qwlora.pipeline.digests import Digests
from qwlora.pipeline.directory_errors import as_directory_errors
from qwlora.pipeline.output_path import check_output, lock_folder, remove_empty
from qwlora.pipeline.ownership import (
    Owner,
    check_replaceable,
    files_in,
    is_unclaimed,
    read_owner,
)
from qwlora.pipeline.stage import Stage
from qwlora.pipeline.stage_records import Record, read_records, records_text, write_records
from qwlora.recipe import Recipe, load_recipe
from qwlora.recipe.yaml_core import dump_yaml

STAGES = "stages.json"
CARD = "README.md"  # the model card in an artifact: for people, no input of any stage


class Directory:
    """The directory of one job. Use `open` to write to it, `peek` or `read` to look at it."""

    def __init__(self, path: Path):
        self.path = path
        self.private = path / ".qwlora"
        self.records: dict[str, Record] = {}
        self.owner = Owner("", "")
        self.damaged_records = 0  # lines of stages.json that cannot be read
        self.digests = Digests(self.private / "digests.json")

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, recipe: Recipe) -> Iterator[Directory]:
        """Claim `path` for `recipe`, and create it if it does not exist.

        If this call claimed the directory and nothing was finished in it, not even a part of a
        stage, everything this call created is removed again: marker, recipe and folders.

        Raises:
            DirectoryError: it belongs to another recipe or to something else, is in use, or
                cannot be written.
        """
        journal.finish(path)
        directory = cls(path)
        directory.check_owner(recipe)
        directory.check_writable()
        with as_directory_errors(path):
            lock, made = lock_folder(directory.private, "lock")
        is_new = False
        try:
            with as_directory_errors(path):
                journal.finish_locked(path)
                # another process may have finished a job here since the check
                directory.check_owner(recipe)
                is_new = read_owner(path) is None
                directory._read_records()
                if not is_new:
                    directory._remove_scratch()  # of a run that was killed
                directory._read_or_make_owner(recipe)
                directory._write_recipe(recipe)
                yield directory
        finally:
            if is_new and not directory._has_results():
                directory._remove_claim()
            remove_empty(made)
            lock.close()

    @classmethod
    @contextlib.contextmanager
    def edit(cls, path: Path) -> Iterator[tuple[Directory, Recipe, list[str | None]]]:
        """Lock an existing job, and only then read its recipe, so that no other change is lost.

        Yields:
            the directory, its recipe, and the command of an interrupted change that was finished
            just now (empty: there was none).

        Raises:
            DirectoryError: it is not a job directory, is in use, or cannot be written.
            RecipeError: its recipe is not valid.
        """
        directory = cls(path)
        check_job(path)
        directory.check_owner(load_recipe(path / "recipe.yaml"))
        directory.check_writable()
        with as_directory_errors(path):
            lock, _ = lock_folder(directory.private, "lock")
            with lock:
                finished = journal.finish_locked(path)
                recipe = load_recipe(path / "recipe.yaml")
                directory.check_owner(recipe)
                directory._read_records()
                directory._remove_scratch()
                directory._read_or_make_owner(recipe)
                yield directory, recipe, finished

    def check_owner(self, recipe: Recipe) -> None:
        """Check that the directory is free or belongs to this job (same recipe name and model).

        Raises:
            DirectoryError: it belongs to another recipe, or contains something else.
        """
        with as_directory_errors(self.path):
            if not check_output(self.path):
                return
            was_unclaimed = is_unclaimed(self.path)  # before the owner: others may claim it
            owner = read_owner(self.path)
            if owner is None and was_unclaimed:
                return
            if owner is None:
                raise DirectoryError(
                    f"{str(self.path)!r} is not empty and was not made by qwlora (it has no "
                    ".qwlora/owner.json); choose another --out"
                )
            if (owner.recipe, owner.model) != (recipe.name, recipe.model.source):
                raise DirectoryError(
                    f"{str(self.path)!r} was made by another recipe ({owner.recipe!r} on "
                    f"{owner.model}), not by {recipe.name!r} on {recipe.model.source}. "
                    "Choose another --out, or delete the directory"
                )
            self._check_recipe(owner, recipe)

    def check_replaceable(self, artifact: str) -> None:
        """Check that everything at `artifact` was made by this job.

        Raises:
            DirectoryError: it contains a file that no record lists.
        """
        check_replaceable(self.path / artifact, self._files_made(artifact))

    @property
    def is_writable(self) -> bool:
        """Whether files can be written here; true if the directory does not exist yet."""
        folders = (self.path, self.private)
        return all(os.access(folder, os.W_OK) for folder in folders if folder.exists())

    def check_writable(self) -> None:
        """Check that the directory is writable.

        Raises:
            DirectoryError: it, or its .qwlora folder, is read-only.
        """
        if not self.is_writable:
            raise DirectoryError(f"{str(self.path)!r} is not writable; choose another --out")

    def problem(self, stage: str, key: str | None) -> str | None:
        """Why `stage` must run, without regard to other stages; None if it need not.

        It need not if its record has `key` (None: any key) and its files are unmodified.
        """
        if (record := self.records.get(stage)) is None:
            return (
                "has not run, or its record is damaged" if self.damaged_records else "has not run"
            )
        if key is not None and record.key != key:
            return "its inputs changed since it ran"
        found = []
        folder = os.path.commonpath(record.files) if len(record.files) > 1 else ""
        if folder and not (self.path / folder).exists():
            return f"{folder}/ is missing"
        for file, digest in record.files.items():
            if Path(file).name == CARD:  # older versions recorded that of PEFT
                continue
            now = self.digests.content(self.path / file)
            if now is None:
                is_there = (self.path / file).exists()
                found.append(f"{file} {'cannot be read' if is_there else 'is missing'}")
            elif now != digest:
                found.append(f"{file} has changed")
        return listed(found, 3) if found else None

    @classmethod
    def peek(cls, path: Path, recipe: Recipe) -> Directory:
        """The records of `path` without claiming it. Raises like `check_owner`."""
        journal.finish(path)
        cls(path).check_owner(recipe)
        directory = cls.read(path)
        directory.owner = read_owner(path) or directory.owner
        return directory

    @classmethod
    def read(cls, path: Path) -> Directory:
        """The records of `path`, regardless of its owner; empty if no job ran there.

        Claims nothing. Writes only to finish a change that was interrupted.
        """
        journal.finish(path)
        directory = cls(path)
        directory._read_records()
        return directory

    def trained_adapters(self) -> list[str]:
        """Adapters that the job has trained, whether or not their folders are there."""
        return [
            stage.removeprefix("train/") for stage in self.records if stage.startswith("train/")
        ]

    def missing_adapters(self) -> list[str]:
        """Adapters that the job has trained but whose folders are missing."""
        return [
            name
            for name in self.trained_adapters()
            if not (self.path / "adapters" / name / "adapter_config.json").is_file()
        ]

    def missing_files(self, artifact: str) -> list[str]:
        """Files that a stage wrote into `artifact` and that are no longer there."""
        listed = (Path(file) for record in self.records.values() for file in record.files)
        return sorted(
            file.name
            for file in listed
            if str(file.parent) == artifact and not (self.path / file).is_file()
        )

    def forget(self, keep: set[str]) -> None:
        """Drop the records of stages that the recipe no longer has; their files stay."""
        self.records = {stage: record for stage, record in self.records.items() if stage in keep}

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder; deleted afterwards unless it was committed."""
        self._scratch.mkdir()
        try:
            yield self._scratch
        finally:
            self._remove_scratch()

    @property
    def _scratch(self) -> Path:
        return self.private / "scratch"

    @property
    def _replaced(self) -> Path:
        """Where the old artifact is kept until the new one is recorded."""
        return self.private / "replaced"

    def _remove_scratch(self) -> None:
        for folder in (self._scratch, self._replaced):
            shutil.rmtree(folder, ignore_errors=True)

    def drop(self, *stages: str) -> None:
        """Drop the records of `stages`; their files stay."""
        for stage in stages:
            self.records.pop(stage, None)
        self._write_records()

    def commit(
        self,
        stage: str,
        record: Record,
        scratch: Path,
        artifact: str | None,
        dependents: Collection[str],
    ) -> None:
        """Replace the artifact with the scratch folder and record the stage.

        Drops the records of `dependents`, which were made from the old artifact.

        Raises:
            DirectoryError: `artifact` contains something that the job did not make.
        """
        old, new = set[str](), set[str]()
        if artifact is not None:
            self.check_replaceable(artifact)
            old, new = self._files_made(artifact), set(files_in(scratch))
            # Listed first, so that the files are known to be the job's if it is killed in between.
            self._write_owner(artifact, old | new)  # the card of a user is among the old
        for name in (stage, *dependents):
            self.records.pop(name, None)
        self._write_records()
        files = {}
        if artifact is not None:
            target = self.path / artifact
            files = {
                str(Path(artifact) / p.relative_to(scratch)): _digest(p) or ""
                for p in sorted(scratch.rglob("*"))
                if p.is_file() and p.name != CARD
            }
            if _holds_users_card(target):
                shutil.copy2(target / CARD, scratch / CARD)
            if old and target.exists():  # moved, since a deletion may be interrupted halfway
                target.rename(self._replaced)
            target.parent.mkdir(parents=True, exist_ok=True)
            move_into_place(scratch, target)
        self.records[stage] = Record(record.key, record.seconds, record.results, files)
        self._write_records()
        if artifact is not None and old - new:
            self._write_owner(artifact, new | (old & {CARD}))

    def set_results(self, stage: str, results: dict[str, Any]) -> None:
        """Replace the results of a finished stage."""
        self.records[stage] = replace(self.records[stage], results=results)
        self._write_records()

    def write_card(self, artifact: str, text: str) -> None:
        """Write the model card of an artifact, unless it has this text or the user edited it.

        Raises:
            DirectoryError: it cannot be written.
        """
        card = self.path / artifact / CARD
        if not card.parent.is_dir() or is_users_card(card) or text_of(card) == text:
            return
        with as_directory_errors(self.path):
            made = self._files_made(artifact)
            if CARD not in made and os.path.lexists(card):
                return  # the user's, and empty or unreadable
            self._write_owner(artifact, made | {CARD})
            write_text(card, text)

    def change(
        self,
        command: list[str | None],
        recipe: Recipe,
        *,
        renamed: Sequence[tuple[Stage, Stage]] = (),
        removed: Sequence[Stage] = (),
        in_results: Callable[[dict[str, Any]], dict[str, Any]] = lambda results: results,
        moves: Sequence[tuple[str, str]] = (),
        removals: Sequence[str] = (),
    ) -> None:
        """Change the recipe, and with it stages: their artifacts, records and unfinished work.

        All of it or nothing is changed, even if the process is killed; see `journal.py`.

        Args:
            command: what the user asked for.
            renamed: stages before and after, with artifacts of the same content.
            removed: stages whose artifacts and records are deleted.
            in_results: the results of a renamed stage after the change.
            moves: other files or folders to move, from and to.
            removals: other files or folders to delete.

        Raises:
            DirectoryError: an artifact contains something that the job did not make, or something
                exists where one is moved to. Nothing was changed.
        """
        names = [(b.artifact, a.artifact) for b, a in renamed if b.artifact != a.artifact]
        artifacts = [(old, new) for old, new in names if old and new and self._exists(old)]
        deleted = [s.artifact for s in removed if s.artifact and self._exists(s.artifact)]
        for artifact in (*(old for old, _ in artifacts), *deleted):
            self.check_replaceable(artifact)
        work = [
            (
                self._in_job(self.work(b.name, b.work_key)),
                self._in_job(self.work(a.name, a.work_key)),
            )
            for b, a in renamed
        ]
        moves = [*artifacts, *((o, n) for o, n in work if self._exists(o) and o != n), *moves]
        for _, new in moves:
            if os.path.lexists(self.path / new):
                raise DirectoryError(f"{str(self.path / new)!r} exists; move it away")
        unfinished = [self._in_job(f) for s in removed for f in self._all_work(s.name)]
        text = dump_yaml(recipe.model_dump(mode="json"))
        owner = self.owner.after(artifacts, deleted, hashlib.sha256(text.encode()).hexdigest())
        records = self._records_after(renamed, removed, in_results)
        content = {
            f".qwlora/{STAGES}": records_text(records),
            ".qwlora/owner.json": owner.to_json(),
            "recipe.yaml": text,
        }
        deletions = [*deleted, *unfinished, *removals]
        moved = [[old, new] for old, new in moves]
        with as_directory_errors(self.path):
            journal.make(self.path, journal.Change(command, moved, deletions, content))
        self.records, self.owner = records, owner

    def _records_after(
        self,
        renamed: Sequence[tuple[Stage, Stage]],
        removed: Sequence[Stage],
        in_results: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> dict[str, Record]:
        gone = {stage.name for stage in (*removed, *(before for before, _ in renamed))}
        records = {name: record for name, record in self.records.items() if name not in gone}
        for before, after in renamed:
            if (record := self.records.get(before.name)) is not None:
                prefix = (f"{before.artifact}/", f"{after.artifact}/")
                records[after.name] = Record(
                    after.key if record.key == before.key else record.key,
                    record.seconds,
                    in_results(record.results),
                    {file.replace(*prefix, 1): digest for file, digest in record.files.items()},
                )
        return records

    def _exists(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def _in_job(self, path: Path) -> str:
        return str(path.relative_to(self.path))

    def work(self, stage: str, key: str) -> Path:
        """Folder for unfinished work that a stage resumes after an interruption; one per key."""
        return self.private / "work" / f"{stage.replace('/', '-')}-{key[:16]}"

    def drop_work(self, stage: str, key: str | None = None) -> None:
        """Delete the work folder of `stage` for `key`; by default those of all keys."""
        for folder in [self.work(stage, key)] if key else self._all_work(stage):
            if folder.exists():
                shutil.rmtree(folder)

    def _all_work(self, stage: str) -> list[Path]:
        return list((self.private / "work").glob(f"{stage.replace('/', '-')}-{'?' * 16}"))

    def _files_made(self, artifact: str) -> set[str]:
        """Files that the job has written to `artifact`, relative to it."""
        folder = Path(artifact)
        listed = (Path(file) for record in self.records.values() for file in record.files)
        # also those of artifacts inside it, such as the proof of a use case
        inside = (Path(a) / file for a, files in self.owner.artifacts.items() for file in files)
        made = (*listed, *inside)
        return {str(file.relative_to(folder)) for file in made if folder in file.parents}

    def _read_or_make_owner(self, recipe: Recipe) -> None:
        owner = read_owner(self.path)
        self.owner = owner or Owner(recipe.name, recipe.model.source)
        if (self.private / "owner.json").is_file():
            return
        if owner is not None:  # a job of an older version, without a marker
            for file in (Path(file) for record in self.records.values() for file in record.files):
                for folder in (p for p in file.parents if p.name):
                    listed = self.owner.artifacts.setdefault(str(folder), [])
                    listed.append(str(file.relative_to(folder)))
            self.owner.recipes = [_digest(self.path / "recipe.yaml") or ""]
        write_text(self.private / "owner.json", self.owner.to_json())

    def _write_owner(self, artifact: str, files: set[str]) -> None:
        self.owner.artifacts[artifact] = sorted(files)
        write_text(self.private / "owner.json", self.owner.to_json())

    def _check_recipe(self, owner: Owner, recipe: Recipe) -> None:
        """Check that `recipe.yaml` equals `recipe`, or can be overwritten without losing edits."""
        file = self.path / "recipe.yaml"
        has_marker = (self.private / "owner.json").is_file()
        if not has_marker or not os.path.lexists(file) or _digest(file) in owner.recipes:
            return
        if not _reads_as(file, recipe):
            raise DirectoryError(
                f"{str(file)!r} was edited after qwlora wrote it, and differs from the recipe of "
                "this run, which would overwrite it. Nothing was changed. Make your changes in "
                "that file and run it without --set, or move it away."
            )

    def _write_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe.

        A file with equal content is kept: it may be the user's own, with comments.
        """
        file = self.path / "recipe.yaml"
        if _reads_as(file, recipe):
            return
        text = dump_yaml(recipe.model_dump(mode="json"))
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.owner.recipes = [*self.owner.recipes[-1:], digest]
        write_text(self.private / "owner.json", self.owner.to_json())
        write_text(file, text)

    def _remove_claim(self) -> None:
        """Remove everything that claiming the directory created. The lock is still held."""
        if _digest(self.path / "recipe.yaml") in self.owner.recipes:
            (self.path / "recipe.yaml").unlink(missing_ok=True)
        for name in ("results.json", "report.html"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.private, ignore_errors=True)

    def _has_results(self) -> bool:
        """Whether a stage was finished, or partly, so that the next run can resume it."""
        work = (self.private / "work").rglob("*")
        return bool(self.records or self.owner.artifacts) or any(file.is_file() for file in work)

    def _read_records(self) -> None:
        self.records, self.damaged_records = read_records(self.private / STAGES)

    def _write_records(self) -> None:
        write_records(self.private / STAGES, self.records)
        self.damaged_records = 0


def check_job(folder: Path) -> None:
    """Check that `folder` is the directory of a job.

    Raises:
        DirectoryError: it is not.
    """
    if not (folder / "recipe.yaml").is_file():
        raise DirectoryError(
            f"{str(folder)!r} is not a job directory: it has no recipe.yaml; `qwlora run` "
            "creates one"
        )


def _holds_users_card(folder: Path) -> bool:
    """Whether README.md of an artifact is the user's. Without the mark it is still the job's if the
    record of exported files has its digest: earlier versions wrote it so."""
    is_of_earlier_version = CARD in manifest.listed_files(
        folder, RECORD
    ) and not manifest.changed_files(folder, RECORD, only=[CARD])
    return is_users_card(folder / CARD) and not is_of_earlier_version


def _reads_as(file: Path, recipe: Recipe) -> bool:
    try:
        return load_recipe(file) == recipe
    except RecipeError:
        return False


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
