"""The output directory of one job.

    DIR/recipe.yaml            the recipe, resolved
    DIR/base/                  the frozen base
    DIR/base_simulation/       encodings of the base's activations (workflow qwa-lora)
    DIR/adapters/NAME/         a PEFT adapter
    DIR/simulation/NAME/       encodings, placement, and the adapter as it was calibrated
    DIR/simulation/_base/      the same of a zero adapter (target onnx)
    DIR/export/TARGET/NAME/    files for a runtime
    DIR/results.json           measurements
    DIR/report.html            the same for people
    DIR/.qwlora/               records of stages, checkpoints, lock, float adapters for reference

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
from qwlora.formats.model_card import is_users_card, text_of
from qwlora.pipeline.job import journal
from qwlora.pipeline.job.digests import Digests
from qwlora.pipeline.job.output_path import as_directory_errors, check_output, lock_folder
from qwlora.pipeline.job.stage_records import (
    FOLDER,
    Record,
    Stage,
    is_unclaimed,
    read_owner,
    read_records,
    record_path,
)
from qwlora.recipe import Recipe, load_recipe
from qwlora.recipe.yaml_core import dump_yaml
from qwlora.system.atomic import flush, write_text

_SEAL = "# Written by qwlora: "
CARD = "README.md"  # the model card in an artifact: for people, no input of any stage


class Directory:
    """The directory of one job. `open` or `edit` to write to it, `read` to look at it.

    Attributes:
        records: of stages that ran.
        outdated: records of stages that must run again.
        damaged: stages whose record is damaged.
    """

    def __init__(self, path: Path, digests: Digests | None = None):
        self.path, self.private = path, path / ".qwlora"
        self.records: dict[str, Record] = {}
        self.outdated: dict[str, Record] = {}
        self.damaged: list[str] = []
        self.digests = digests or Digests(self.private / "digests.json")

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        path: Path,
        recipe: Recipe,
        recipe_text: str | None = None,
        digests: Digests | None = None,
    ) -> Iterator[Directory]:
        """Claim `path` for `recipe`, and create it if it does not exist.

        If this call claimed the directory and nothing was finished in it, not even a part of a
        stage, everything this call created is removed again: marker, recipe and folders.

        Args:
            recipe_text: the directory's own recipe.yaml when `recipe` was read, or empty if there
                was none; a DirectoryError if another command changed it. Default: not compared.
            digests: of the job's files, if they are known.
        """
        journal.finish(path)
        directory = cls(path, digests)
        directory.check_owner(recipe)
        with directory._locked():
            directory.check_owner(recipe)  # another process may have finished a job here since
            if recipe_text is not None and text_of(path / "recipe.yaml") != recipe_text:
                raise DirectoryError(f"the recipe of {str(path)!r} changed meanwhile; run again")
            is_new = read_owner(path) is None
            try:
                (path / FOLDER).mkdir(exist_ok=True)
                if not _reads_as(path / "recipe.yaml", recipe):  # else perhaps with comments
                    write_text(path / "recipe.yaml", _sealed(recipe))
                yield directory
            finally:
                has_work = any(f.is_file() for f in (directory.private / "work").rglob("*"))
                has_results = directory.records or directory.outdated or journal.is_pending(path)
                if is_new and not has_results and not has_work:
                    if _is_sealed(path / "recipe.yaml"):
                        (path / "recipe.yaml").unlink()
                    for name in ("results.json", "report.html"):
                        (path / name).unlink(missing_ok=True)
                    shutil.rmtree(directory.private, ignore_errors=True)

    @classmethod
    @contextlib.contextmanager
    def edit(cls, path: Path) -> Iterator[tuple[Directory, Recipe, list[str | None]]]:
        """Lock an existing job, and only then read its recipe, so that no other change is lost.

        Yields:
            the directory, its recipe, and the command of an interrupted change that was finished
            just now (empty: there was none).
        """
        directory = cls(path)
        check_job(path)
        directory.check_owner(load_recipe(path / "recipe.yaml"))
        with directory._locked() as finished:
            recipe = load_recipe(path / "recipe.yaml")
            directory.check_owner(recipe)
            yield directory, recipe, finished

    @contextlib.contextmanager
    def _locked(self) -> Iterator[list[str | None]]:
        """Hold the job's lock; begins with what an interrupted command left, and the records."""
        self.check_writable()
        with as_directory_errors(self.path), lock_folder(self.private, self.path):
            finished = journal.finish_locked(self.path)
            self._read_records()
            self._remove_scratch()
            yield finished

    @classmethod
    def read(
        cls, path: Path, recipe: Recipe | None = None, digests: Digests | None = None
    ) -> Directory:
        """The records of `path`; empty if no job ran there. With a recipe, also checks the owner.

        Claims nothing. Writes only to finish a change that was interrupted.
        """
        journal.finish(path)
        directory = cls(path, digests)
        if recipe is not None:
            directory.check_owner(recipe)
        directory._read_records()
        return directory

    def _read_records(self) -> None:
        records, self.damaged = read_records(self.path)
        self.records = {name: record for name, record in records.items() if record.key}
        self.outdated = {name: record for name, record in records.items() if not record.key}

    # Whose it is

    def check_owner(self, recipe: Recipe) -> None:
        """Check that the directory is free or belongs to this job (same recipe name and model)."""
        with as_directory_errors(self.path):
            if not check_output(self.path):
                return
            was_unclaimed = is_unclaimed(self.path)  # before the owner: others may claim it
            owner = read_owner(self.path)
            if owner is None:
                if was_unclaimed:
                    return
                raise DirectoryError(
                    f"{str(self.path)!r} is not empty and was not made by qwlora (it has no "
                    f"{FOLDER}); choose another --out"
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
        """Check that everything at the artifact of `stage` was made by this job: a record lists it.

        Args:
            new: files that replace the artifact's. If the stage's record is damaged, files of these
                names count as the job's; if they are not known yet, all do.
        """
        target, prefix = self.path / artifact, f"{artifact}/"
        is_damaged = stage in self.damaged
        if (is_damaged and not new) or not os.path.lexists(target):
            return
        records = (*self.records.values(), *self.outdated.values())  # also of artifacts inside it
        known = {f.removeprefix(prefix) for r in records for f in r.files if f.startswith(prefix)}
        known |= set(new) if is_damaged else set()
        if not target.is_dir() or target.is_symlink():
            problem = "exists and is not a folder"
        elif foreign := [
            name
            for name in _files_in(target)
            if name not in known and (name != CARD or is_users_card(target / CARD))
        ]:
            more = f" and {len(foreign) - 1} more files" if len(foreign) > 1 else ""
            problem = f"contains {foreign[0]!r}{more}"
        else:
            return
        raise DirectoryError(
            f"{str(target)!r} {problem}, which this job did not make according to its records, but "
            "would replace. Nothing was changed. Move it out of the job's directory and run again."
        )

    @property
    def is_writable(self) -> bool:
        """Whether files can be written here; true if the directory does not exist yet."""
        folders = (self.path, self.private)
        return all(os.access(folder, os.W_OK) for folder in folders if folder.exists())

    def check_writable(self) -> None:
        """Check that the directory, and its .qwlora folder, is writable."""
        if not self.is_writable:
            raise DirectoryError(f"{str(self.path)!r} is not writable; choose another --out")

    # What is in it

    def problem(self, stage: str, key: str | None) -> str | None:
        """Why `stage` must run, without regard to other stages; None if it need not.

        It need not if its record has `key` (None: any key) and its files are unmodified.
        """
        if (record := self.records.get(stage)) is None:
            return "its record is damaged" if stage in self.damaged else "has not run"
        if key is not None and record.key != key:
            return "its inputs changed since it ran"
        files = [file for file in record.files if Path(file).name != CARD]
        folder = os.path.commonpath(files) if len(files) > 1 else ""
        if folder and not (self.path / folder).exists():
            return f"{folder}/ is missing"
        problems = []
        for file in files:
            if (now := self.digests.content(self.path / file)) is None:
                is_there = (self.path / file).exists()
                problems.append(f"{file} {'cannot be read' if is_there else 'is missing'}")
            elif now != record.files[file]:
                problems.append(f"{file} has changed")
        return listed(problems, 3) if problems else None

    def trained_adapters(self) -> list[str]:
        """Adapters that the job has trained, whether or not their folders are there."""
        return [s[6:] for s in self.records if s.startswith("train/") and s.count("/") == 1]

    # What a stage writes

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder; deleted afterwards unless it was committed."""
        (self.private / "scratch").mkdir()
        try:
            yield self.private / "scratch"
        finally:
            self._remove_scratch()

    def _remove_scratch(self) -> None:
        if not journal.is_pending(self.path):  # else the next command needs it
            for name in ("scratch", journal.TRASH):
                shutil.rmtree(self.private / name, ignore_errors=True)

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
        """
        moves, files = list[tuple[str, str]](), dict[str, str]()
        if artifact is not None:
            self.check_replaceable(stage, artifact, _files_in(scratch))
            if is_users_card(self.path / artifact / CARD):
                shutil.copy2(self.path / artifact / CARD, scratch / CARD)
            digests = Digests()
            for name in _files_in(scratch):
                files[f"{artifact}/{name}"] = digests.content(scratch / name) or ""
            flush(scratch)
            moves = [(self._in_job(scratch), artifact)]
        old = {name: self.records[name].outdated() for name in dependents if name in self.records}
        new = replace(record, files=files)
        self._make([], moves, [artifact] if artifact else [], {**old, stage: new})

    def set_results(self, stage: str, results: dict[str, Any]) -> None:
        self.records[stage] = record = replace(self.records[stage], results=results)
        write_text(self.path / record_path(stage), record.text(stage))

    def write_card(self, artifact: str, text: str) -> None:
        """Write the model card of an artifact, unless it has this text or the user edited it."""
        card = self.path / artifact / CARD
        if card.parent.is_dir() and not is_users_card(card) and text_of(card) != text:
            write_text(card, text)

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

    # Changes of the recipe

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
        names = [(before.artifact, after.artifact) for before, after in renamed]
        pairs = [(old, new) for old, new in names if old and new and old != new]
        gone = [stage.artifact for stage in removed if stage.artifact]
        for stage in (*(before for before, _ in renamed), *removed):
            if stage.artifact in (*(old for old, _ in pairs), *gone):
                self.check_replaceable(stage.name, str(stage.artifact))
        for stages in renamed:
            before, after = (self._in_job(self.work(s.name, s.key)) for s in stages)
            pairs.append((before, after))
        moves = [*((o, n) for o, n in pairs if os.path.lexists(self.path / o)), *moves]
        for _, new in moves:
            if os.path.lexists(self.path / new):
                raise DirectoryError(f"{str(self.path / new)!r} exists; move it away")
        gone += [self._in_job(f) for stage in removed for f in self._all_work(stage.name)]
        records: dict[str, Record | None] = {
            stage.name: None for stage in (*removed, *(before for before, _ in renamed))
        }
        for old_stage, new_stage in renamed:
            record = self.records.get(old_stage.name) or self.outdated.get(old_stage.name)
            if record is not None:
                prefixes = f"{old_stage.artifact}/", f"{new_stage.artifact}/"
                moved = {name.replace(*prefixes, 1): d for name, d in record.files.items()}
                records[new_stage.name] = Record(
                    new_stage.key if record.key == old_stage.key else record.key,
                    record.seconds,
                    in_results(record.results),
                    {f: _text_digest(files[f]) if f in files else d for f, d in moved.items()},
                )
        texts = {**files, "recipe.yaml": _sealed(recipe)}
        with as_directory_errors(self.path):
            self._make(command, moves, [*gone, *removals], records, texts)

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

    def _in_job(self, path: Path) -> str:
        return str(path.relative_to(self.path))


def check_job(folder: Path) -> None:
    """Check that `folder` is the directory of a job."""
    if not (folder / "recipe.yaml").is_file():
        raise DirectoryError(
            f"{str(folder)!r} is not a job directory: it has no recipe.yaml; `qwlora run` "
            "creates one"
        )


def _files_in(folder: Path) -> list[str]:
    """All files under `folder`, relative to it. Includes links, but does not follow them."""
    paths = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        paths += [os.path.relpath(os.path.join(root, name), folder) for name in (*files, *links)]
    return sorted(paths)


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
