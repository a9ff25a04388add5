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
    DIR/.qwlora/               records of stages, checkpoints, lock

Artifacts are written to a scratch folder, flushed to disk and moved into place together with their
record (`journal.py`), so they are never incomplete and never without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qwlora.errors import DirectoryError, RecipeError, listed
from qwlora.formats.card_mark import is_users_card, text_of
from qwlora.pipeline.job import journal, stage_records
from qwlora.pipeline.job.digests import Digests
from qwlora.pipeline.job.output_path import (
    as_directory_errors,
    check_output,
    lock_folder,
    remove_empty,
)
from qwlora.pipeline.job.ownership import files_in, is_unclaimed, read_owner
from qwlora.pipeline.job.stage_records import Record, read_records, record_path
from qwlora.pipeline.plan.stage import Stage
from qwlora.recipe import Recipe, load_recipe
from qwlora.recipe.yaml_core import dump_yaml
from qwlora.system.atomic import flush, write_text

_SEAL = "# Written by qwlora: "
CARD = "README.md"  # the model card in an artifact: for people, no input of any stage


class RecipeChangedError(DirectoryError):
    """Another command changed the job's recipe since it was read."""


class Directory:
    """The directory of one job. Use `open` to write to it, `peek` or `read` to look at it."""

    def __init__(self, path: Path):
        self.path = path
        self.private = path / ".qwlora"
        self.records: dict[str, Record] = {}  # of stages that ran
        self.outdated: dict[str, Record] = {}  # of stages that must run again
        self.damaged: list[str] = []  # stages whose record is damaged
        self.digests = Digests(self.private / "digests.json")

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, path: Path, recipe: Recipe, recipe_text: str | None = None
    ) -> Iterator[Directory]:
        """Claim `path` for `recipe`, and create it if it does not exist.

        If this call claimed the directory and nothing was finished in it, not even a part of a
        stage, everything this call created is removed again: marker, recipe and folders.

        Args:
            recipe_text: the directory's own recipe.yaml when `recipe` was read, or empty if there
                was none. Default: it may have changed since.

        Raises:
            RecipeChangedError: it has another text by now.
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
                if recipe_text is not None and text_of(path / "recipe.yaml") != recipe_text:
                    raise RecipeChangedError(
                        f"the recipe of {str(path)!r} changed meanwhile; run again"
                    )
                is_new = read_owner(path) is None
                directory._read_records()
                directory._remove_scratch()  # of a run that was killed
                (path / stage_records.FOLDER).mkdir(exist_ok=True)
                if not _reads_as(path / "recipe.yaml", recipe):  # else perhaps with comments
                    write_text(path / "recipe.yaml", _sealed(recipe))
                yield directory
        finally:
            unfinished = any(f.is_file() for f in (directory.private / "work").rglob("*"))
            has_results = directory.records or directory.outdated or journal.is_pending(path)
            if is_new and not has_results and not unfinished:
                made_here = ["results.json", "report.html"]
                made_here += ["recipe.yaml"] if _is_sealed(path / "recipe.yaml") else []
                for name in made_here:
                    (path / name).unlink(missing_ok=True)
                shutil.rmtree(directory.private, ignore_errors=True)
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
                    f"{stage_records.FOLDER}); choose another --out"
                )
            if owner != (recipe.name, recipe.model.source):
                raise DirectoryError(
                    f"{str(self.path)!r} was made by another recipe ({owner[0]!r} on {owner[1]}), "
                    f"not by {recipe.name!r} on {recipe.model.source}. Choose another --out, or "
                    "delete the directory"
                )
            file = self.path / "recipe.yaml"
            if os.path.lexists(file) and not _is_sealed(file) and not _reads_as(file, recipe):
                raise DirectoryError(
                    f"{str(file)!r} was edited after qwlora wrote it, and differs from the recipe "
                    "of this run, which would overwrite it. Nothing was changed. Make your changes "
                    "in that file and run it without --set, or move it away."
                )

    def check_replaceable(self, stage: str, artifact: str, new: Collection[str] = ()) -> None:
        """Check that everything at the artifact of `stage` was made by this job.

        Args:
            new: files that replace the artifact's. If the stage's record is damaged, files of these
                names count as the job's; if they are not known yet, all do.

        Raises:
            DirectoryError: it contains a file that no record lists.
        """
        prefix = f"{artifact}/"  # also of artifacts inside it, such as the proof of a use case
        records = (*self.records.values(), *self.outdated.values())
        listed = (file for record in records for file in record.files if file.startswith(prefix))
        known = {file.removeprefix(prefix) for file in listed}
        if stage in self.damaged:
            known |= set(new)
        target = self.path / artifact
        if (stage in self.damaged and not new) or not os.path.lexists(target):
            return
        is_folder = target.is_dir() and not target.is_symlink()
        foreign = [name for name in files_in(target) if name not in known] if is_folder else []
        if is_folder and not foreign:
            return
        more = f" and {len(foreign) - 1} more files" if len(foreign) > 1 else ""
        what = f"contains {foreign[0]!r}{more}" if foreign else "exists and is not a folder"
        raise DirectoryError(
            f"{str(target)!r} {what}, which this job did not make according to its records, but "
            "would replace. Nothing was changed. Move it out of the job's directory and run again."
        )

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
            return "its record is damaged" if stage in self.damaged else "has not run"
        if key is not None and record.key != key:
            return "its inputs changed since it ran"
        found = []
        files = [file for file in record.files if Path(file).name != CARD]
        folder = os.path.commonpath(files) if len(files) > 1 else ""
        if folder and not (self.path / folder).exists():
            return f"{folder}/ is missing"
        for file in files:
            now = self.digests.content(self.path / file)
            if now is None:
                is_there = (self.path / file).exists()
                found.append(f"{file} {'cannot be read' if is_there else 'is missing'}")
            elif now != record.files[file]:
                found.append(f"{file} has changed")
        return listed(found, 3) if found else None

    @classmethod
    def peek(cls, path: Path, recipe: Recipe) -> Directory:
        """The records of `path` without claiming it. Raises like `check_owner`."""
        journal.finish(path)
        cls(path).check_owner(recipe)
        return cls.read(path)

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
            name for verb, _, name in (s.partition("/") for s in self.records) if verb == "train"
        ]

    def missing_adapters(self) -> list[str]:
        """Adapters that the job has trained but whose folders are missing."""
        folder, file = self.path / "adapters", "adapter_config.json"
        return [name for name in self.trained_adapters() if not (folder / name / file).is_file()]

    def missing_files(self, artifact: str) -> list[str]:
        """Files that a stage wrote into `artifact` and that are no longer there."""
        listed = [Path(file) for record in self.records.values() for file in record.files]
        own = [file for file in listed if str(file.parent) == artifact and file.name != CARD]
        return sorted(file.name for file in own if not (self.path / file).is_file())

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

    def _remove_scratch(self) -> None:
        if not journal.is_pending(self.path):  # else the next command needs it
            for folder in (self._scratch, self.private / journal.TRASH):
                shutil.rmtree(folder, ignore_errors=True)

    def drop(self, *stages: str) -> None:
        """Mark the records of `stages` as outdated; their files stay."""
        for stage in stages:
            if (record := self.records.pop(stage, None)) is not None:
                self.outdated[stage] = record.outdated()
                write_text(self.path / record_path(stage), self.outdated[stage].text(stage))

    def commit(
        self,
        stage: str,
        record: Record,
        scratch: Path,
        artifact: str | None,
        dependents: Collection[str],
    ) -> None:
        """Replace the artifact with the scratch folder and record the stage.

        Marks the records of `dependents`, which were made from the old artifact, as outdated.

        Raises:
            DirectoryError: `artifact` contains something that the job did not make.
        """
        moves, files = list[tuple[str, str]](), dict[str, str]()
        if artifact is not None:
            self.check_replaceable(stage, artifact, files_in(scratch))
            if is_users_card(self.path / artifact / CARD):
                shutil.copy2(self.path / artifact / CARD, scratch / CARD)
            digests = Digests()
            files = {
                f"{artifact}/{name}": digests.content(scratch / name) or ""
                for name in files_in(scratch)
            }
            flush(scratch)
            moves = [(self._in_job(scratch), artifact)]
        old = {name: self.records[name].outdated() for name in dependents if name in self.records}
        new = Record(record.key, record.seconds, record.results, files)
        self._make([], moves, [artifact] if artifact else [], {**old, stage: new})

    def set_results(self, stage: str, results: dict[str, Any]) -> None:
        """Replace the results of a finished stage."""
        self._write(stage, replace(self.records[stage], results=results))

    def write_card(self, artifact: str, text: str) -> None:
        """Write the model card of an artifact, unless it has this text or the user edited it.

        Raises:
            DirectoryError: it cannot be written.
        """
        card = self.path / artifact / CARD
        if not card.parent.is_dir() or is_users_card(card) or text_of(card) == text:
            return
        with as_directory_errors(self.path):
            folders = {s: {str(Path(f).parent) for f in r.files} for s, r in self.records.items()}
            stage = next((stage for stage, parents in folders.items() if artifact in parents), None)
            if stage is None:
                return
            record, name = self.records[stage], f"{artifact}/{CARD}"
            if name not in record.files:
                if os.path.lexists(card):
                    return  # the user's, and empty or unreadable
                self._write(stage, replace(record, files={**record.files, name: ""}))
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
        files: Mapping[str, str] = MappingProxyType({}),
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
            files: other files to write, and their content.

        Raises:
            DirectoryError: an artifact contains something that the job did not make, or something
                exists where one is moved to. Nothing was changed.
        """
        names = [(b.artifact, a.artifact) for b, a in renamed if b.artifact != a.artifact]
        artifacts = [(old, new) for old, new in names if old and new and self._exists(old)]
        deleted = [s.artifact for s in removed if s.artifact and self._exists(s.artifact)]
        for stage in (*(before for before, _ in renamed), *removed):
            if stage.artifact in (*(old for old, _ in artifacts), *deleted):
                self.check_replaceable(stage.name, stage.artifact)
        work = [
            tuple(self._in_job(self.work(s.name, s.work_key)) for s in pair) for pair in renamed
        ]
        moves = [*artifacts, *((o, n) for o, n in work if self._exists(o)), *moves]
        for _, new in moves:
            if os.path.lexists(self.path / new):
                raise DirectoryError(f"{str(self.path / new)!r} exists; move it away")
        unfinished = [self._in_job(f) for s in removed for f in self._all_work(s.name)]
        records: dict[str, Record | None] = {stage.name: None for stage in removed}
        records |= {before.name: None for before, _ in renamed}
        for before, after in renamed:
            record = self.records.get(before.name) or self.outdated.get(before.name)
            if record is not None:
                prefix = (f"{before.artifact}/", f"{after.artifact}/")
                moved = {name.replace(*prefix, 1): digest for name, digest in record.files.items()}
                records[after.name] = Record(
                    after.key if record.key == before.key else record.key,
                    record.seconds,
                    in_results(record.results),
                    {f: _text_digest(files[f]) if f in files else d for f, d in moved.items()},
                )
        texts = {**files, "recipe.yaml": _sealed(recipe)}
        with as_directory_errors(self.path):
            self._make(command, moves, [*deleted, *unfinished, *removals], records, texts)

    def _make(
        self,
        command: list[str | None],
        moves: Sequence[tuple[str, str]],
        removals: Sequence[str],
        records: Mapping[str, Record | None],
        files: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Make one change of the directory; a record that is None is deleted."""
        texts = {record_path(n): None if r is None else r.text(n) for n, r in records.items()}
        journal.make(self.path, command, moves, removals, {**texts, **files})
        for name, record in records.items():
            for known in (self.records, self.outdated):
                known.pop(name, None)
            if record is not None:
                (self.records if record.key else self.outdated)[name] = record
            if name in self.damaged:
                self.damaged.remove(name)

    def _write(self, stage: str, record: Record) -> None:
        self.records[stage] = record
        write_text(self.path / record_path(stage), record.text(stage))

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

    def _read_records(self) -> None:
        records, self.damaged = read_records(self.path)
        self.records = {name: record for name, record in records.items() if record.key}
        self.outdated = {name: record for name, record in records.items() if not record.key}


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


def _reads_as(file: Path, recipe: Recipe) -> bool:
    try:
        return load_recipe(file) == recipe
    except RecipeError:
        return False


def _sealed(recipe: Recipe) -> str:
    """The text of recipe.yaml, with a last line that says whether it was edited since."""
    text = dump_yaml(recipe.model_dump(mode="json"))
    return f"{text}{_SEAL}{_text_digest(text)}\n"


def _is_sealed(file: Path) -> bool:
    """Whether the job wrote `file`, and nobody edited it since."""
    text, seal, digest = text_of(file).rpartition(_SEAL)
    return bool(seal) and digest.strip() == _text_digest(text)


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
