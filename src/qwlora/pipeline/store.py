"""What a job has made. Each artifact says what it is in its stage.json, and is replaced as a whole.

    DIR/recipe.yaml            the recipe, which the user may edit
    DIR/base/                  the frozen base
    DIR/base_simulation/       encodings of the base's activations (workflow qwa-lora)
    DIR/adapters/NAME/         a PEFT adapter
    DIR/simulation/NAME/       encodings, placement, and the adapter as it was calibrated
    DIR/simulation/_base/      the same of a zero adapter (target onnx)
    DIR/export/TARGET/NAME/    files for a runtime
        stage.json             in each of these folders: what it was made from
    DIR/results.json           built from the stage.json files
    DIR/report.html            the same for people
    DIR/.qwlora/stages/        stage.json of stages that write no artifact
    DIR/.qwlora/tmp/           artifacts that are being written or replaced
    DIR/.qwlora/               also checkpoints, lock, float adapters, seen.json (a cache)

A new artifact is complete and on the disk, its stage.json last, before the old one moves to tmp/.
So after a kill, a folder in tmp/ with a stage.json is complete and is put in place (`settle`), and
anything else there is deleted. There is no journal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from qwlora.errors import DirectoryError, listed
from qwlora.formats.model_card import is_users_card, text_of
from qwlora.pipeline.output_path import as_directory_errors, lock_folder
from qwlora.pipeline.seen import Seen, sealed, unsealed
from qwlora.system.atomic import files_in, flush, flush_folder, write_text
from qwlora.system.regular_files import is_inside
from qwlora.targets.proof.contents import STAGE

CARD = "README.md"  # the model card in an artifact: for people, no input of any stage
STAGES, TMP = ".qwlora/stages", ".qwlora/tmp"
# Keys of a record's results that stand for the stage's adapter and text: names are labels, and no
# name can be one of these.
NAME, TEXT_NAME = "*", "*text"
# Where artifacts are. A path, relative to the job, is what a stage is known by on disk.
_ARTIFACTS = (
    *("base", "base_simulation", "adapters/*", "simulation/*"),
    *("export/*", "export/*/*", "export/*/proof/*", ".qwlora/sampled", ".qwlora/reference/*"),
)


@dataclass(frozen=True)
class Record:
    """A stage.json: what a stage made, and from what.

    Args:
        stage: the kind of stage, without names of adapters.
        inputs: settings and digests that the result depends on, by name.
        needs: `version` of each record that the stage read.
        results: its part of results.json, with `NAME` and `TEXT_NAME` for names.
        files: SHA-256 of each file of the artifact, by its path in it.
        seconds: that the stage took.
        made_by: the release that ran it; for people.
        not_run: which program was missing, so that files could not be run here.
        failed: whether files were run and do not compute what was trained.
    """

    stage: str
    inputs: dict[str, Any]
    needs: dict[str, str]
    results: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    made_by: str = ""
    not_run: str = ""
    failed: bool = False

    @property
    def key(self) -> str:
        """SHA-256 of what the result depends on."""
        return _digest([self.stage, self.inputs, self.needs])

    @property
    def version(self) -> str:
        """SHA-256 of key and files: two runs with one key may round differently on two machines."""
        return _digest([self.key, self.files])

    def text(self) -> str:
        return sealed(asdict(self))


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(file: Path) -> Record | None:
    """The record in `file`; None if it is missing, damaged, or lists a file outside its folder."""
    try:
        record = Record(**(unsealed(file) or {}))
        paths = map(Path, record.files)
        if any(path.is_absolute() or ".." in path.parts for path in paths):
            return None
    except TypeError:
        return None
    return record


class Store:
    """The artifacts and records of one job.

    Attributes:
        records: by the path of the artifact, or of the file in `STAGES`, relative to the job.
        damaged: paths whose stage.json cannot be read.
    """

    def __init__(self, path: Path, seen: Seen | None = None):
        self.path, self.private = path, path / ".qwlora"
        self.seen = seen or Seen(self.private / "seen.json")
        self.reload()

    def reload(self) -> None:
        """Read all records again."""
        self.records: dict[str, Record] = {}
        self.damaged: set[str] = set()
        places = [str(p.relative_to(self.path)) for g in _ARTIFACTS for p in self.path.glob(g)]
        found = {place: self._file(place) for place in places}
        found |= {
            str(file.relative_to(self.path)): file for file in self.path.glob(f"{STAGES}/**/*.json")
        }
        for place, file in found.items():
            # Behind a link are files of somebody else, which must not be moved or deleted.
            if os.path.lexists(file) and is_inside(self.path, place):
                if (record := read_record(file)) is None:
                    self.damaged.add(place)
                else:
                    self.records[place] = record

    def _file(self, place: str) -> Path:
        """The record of a path."""
        is_file = place.startswith(f"{STAGES}/")
        return self.path / place if is_file else self.path / place / STAGE

    # Access

    @property
    def is_writable(self) -> bool:
        """Whether files can be written here; true if the directory does not exist yet."""
        folders = (self.path, self.private)
        return all(os.access(folder, os.W_OK) for folder in folders if folder.exists())

    @property
    def has_work(self) -> bool:
        """Whether a stage was finished here, or begun so that it resumes."""
        return bool(self.records) or any(f.is_file() for f in (self.private / "work").rglob("*"))

    def check_writable(self) -> None:
        """Check that the directory, and its .qwlora folder, is writable."""
        if not self.is_writable:
            raise DirectoryError(f"{str(self.path)!r} is not writable; choose another --out")

    def check_unclaimed(self) -> None:
        """Check that the directory is new, empty, or left by a command that was killed before it
        wrote a recipe."""
        with as_directory_errors(self.path):
            inside = os.listdir(self.path) if self.path.is_dir() else []
            if {*inside} - {".qwlora", ".recipe.yaml.part"} or self.records:
                raise DirectoryError(
                    f"{str(self.path)!r} is not empty and was not made by qwlora (it has no "
                    "recipe.yaml next to .qwlora); choose another --out"
                )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the job's lock; records are read again. If it is no job afterwards, since no recipe
        was written, nothing stays."""
        self.check_writable()
        with as_directory_errors(self.path), lock_folder(self.private, self.path):
            self.reload()
            try:
                yield
            finally:
                if not (self.path / "recipe.yaml").is_file():
                    shutil.rmtree(self.private, ignore_errors=True)

    # What is there

    def version(self, place: str) -> str:
        """`Record.version` of what is at `place`; empty if nothing is."""
        record = self.records.get(place)
        return "" if record is None else record.version

    def problem(self, place: str) -> str | None:
        """Why the files at `place` are not those of its record; None if they are."""
        record = self.records[place]
        if not record.files:
            return None
        if not (self.path / place).exists():
            return f"{place}/ is missing"
        problems = []
        for name, digest in record.files.items():
            file = self.path / place / name
            if (now := self.seen.content(file)) is None:
                problems.append(
                    f"{place}/{name} {'cannot be read' if file.exists() else 'is missing'}"
                )
            elif now != digest:
                problems.append(f"{place}/{name} has changed")
        return listed(problems, 3) if problems else None

    def check_replaceable(self, place: str, new: Collection[str] = ()) -> None:
        """Check that everything at `place` was made by this job: a record lists it.

        Args:
            new: files that take the place. If the record is damaged, files of these names count as
                the job's; if they are not known yet, all do.
        """
        target, is_damaged = self.path / place, place in self.damaged
        is_file = place.startswith(f"{STAGES}/")
        if is_file or not os.path.lexists(target) or (is_damaged and not new):
            return
        inside = {p: r for p, r in self.records.items() if p == place or p.startswith(f"{place}/")}
        known = {f"{p}/{name}" for p, record in inside.items() for name in (*record.files, STAGE)}
        known |= {f"{place}/{name}" for name in (*new, STAGE)} if is_damaged else set()
        if not target.is_dir() or target.is_symlink():
            problem = "exists and is not a folder"
        elif foreign := [
            name
            for name in _names_in(target)
            if f"{place}/{name}" not in known and (name != CARD or is_users_card(target / CARD))
        ]:
            more = f" and {len(foreign) - 1} more files" if len(foreign) > 1 else ""
            problem = f"contains {foreign[0]!r}{more}"
        else:
            return
        raise DirectoryError(
            f"{str(target)!r} {problem}, which this job did not make according to its records, but "
            "would replace. Nothing was changed. Move it out of the job's directory and run again."
        )

    # Changes; the caller holds the lock

    @contextlib.contextmanager
    def scratch(self, place: str) -> Iterator[Path]:
        """An empty folder for a new artifact; deleted afterwards unless it was committed."""
        folder = self._tmp(place)
        _discard(folder)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            _discard(folder)
            with contextlib.suppress(OSError):  # not empty
                folder.parent.rmdir()

    def commit(self, place: str, record: Record, scratch: Path) -> Record:
        """Put what a stage made in place, with its record; returns the record with the files."""
        file = self._file(place)
        if file.name != STAGE:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, record.text())
        else:
            names = files_in(scratch)
            self.check_replaceable(place, names)
            digests = Seen()
            files = {
                name: digests.content(scratch / name) or ""
                for name in names
                if Path(name).name != CARD
            }
            record = replace(record, files=files)
            if is_users_card(self.path / place / CARD):
                shutil.copy2(self.path / place / CARD, scratch / CARD)
            flush(scratch)
            write_text(scratch / STAGE, record.text())
            flush_folder(scratch)
            old = self._put_aside(place) if (self.path / place).exists() else None
            self._move(scratch, place)
            if old is not None:
                _discard(old)
            for inside in [p for p in self.records if p.startswith(f"{place}/")]:
                del self.records[inside]  # it went with the old artifact
        self.records[place] = record
        self.damaged.discard(place)
        return record

    def set_results(self, place: str, results: dict[str, Any]) -> None:
        """Replace the results of a record."""
        self.records[place] = record = replace(self.records[place], results=results)
        with as_directory_errors(self.path):
            write_text(self._file(place), record.text())

    def recommit(self, place: str, name: str) -> None:
        """Record another content of a file of an artifact."""
        record, digest = self.records[place], Seen().content(self.path / place / name)
        self.records[place] = replace(record, files={**record.files, name: digest or ""})
        write_text(self._file(place), self.records[place].text())

    def remove(self, places: Iterable[str]) -> None:
        """Delete artifacts or records."""
        for place in places:
            if os.path.lexists(self.path / place):
                _discard(self._put_aside(place))
            for inside in [p for p in self.records if p == place or p.startswith(f"{place}/")]:
                del self.records[inside]
            self.damaged.discard(place)

    def settle(self, moves: Mapping[str, str]) -> None:
        """Rename artifacts, from and to; an artifact may move to where another one leaves.

        Each goes through tmp/ under its new name, so that `finish` completes it after a kill.
        """
        for new in moves.values():
            self.check_replaceable(new)
        moved = {new: self.records[old] for old, new in moves.items()}
        for old, new in moves.items():
            _discard(self._tmp(new))
            self._tmp(new).parent.mkdir(parents=True, exist_ok=True)
            (self.path / old).rename(self._tmp(new))
            flush_folder((self.path / old).parent)
            del self.records[old]
        for new in moves.values():
            self.remove([new] if os.path.lexists(self.path / new) else [])
            self._move(self._tmp(new), new)
        self.records |= moved

    def finish(self) -> None:
        """Put complete artifacts in tmp/ in place, unless something is there, and delete the rest.

        Of a new artifact and the old one, which a kill left without a place, the new one counts.
        """
        folder = self.path / TMP
        waiting = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in sorted(waiting, key=lambda path: path.name.endswith(".old")):
            place = unquote(path.name.removesuffix(".old"))
            record = read_record(path / STAGE if path.is_dir() else path)
            is_plain = not path.is_symlink() and is_inside(self.path, place)
            if record and is_plain and not os.path.lexists(self.path / place):
                self._move(path, place)
                self.records[place] = record
            else:
                _discard(path)
        with contextlib.suppress(OSError):
            folder.rmdir()

    def _put_aside(self, place: str) -> Path:
        """Move what is at `place` to tmp/; `finish` moves it back if nothing took its place."""
        old = self._tmp(place).with_name(f"{self._tmp(place).name}.old")
        _discard(old)
        old.parent.mkdir(parents=True, exist_ok=True)
        (self.path / place).rename(old)
        flush_folder((self.path / place).parent)
        return old

    def _tmp(self, place: str) -> Path:
        return self.path / TMP / quote(place, safe="")

    def _move(self, source: Path, place: str) -> None:
        target = self.path / place
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        flush_folder(source.parent)
        flush_folder(target.parent)

    def write_card(self, place: str, text: str) -> None:
        """Write the model card of an artifact, unless it has this text or the user edited it."""
        card = self.path / place / CARD
        if card.parent.is_dir() and not is_users_card(card) and text_of(card) != text:
            write_text(card, text)

    def drop_work(self, key: str) -> None:
        """Delete the work folder of a key."""
        shutil.rmtree(self.work(key), ignore_errors=True)

    def work(self, key: str) -> Path:
        """Folder for unfinished work that a stage resumes after an interruption; one per key."""
        return self.private / "work" / key[:16]


def check_job(folder: Path) -> None:
    """Check that `folder` is the directory of a job."""
    if not (folder / "recipe.yaml").is_file():
        raise DirectoryError(
            f"{str(folder)!r} is not a job directory: it has no recipe.yaml; `qwlora run` "
            "creates one"
        )


def _names_in(folder: Path) -> list[str]:
    """All files under `folder`, relative to it. Includes links, but does not follow them."""
    paths = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        paths += [os.path.relpath(os.path.join(root, name), folder) for name in (*files, *links)]
    return sorted(paths)


def _discard(path: Path) -> None:
    """Delete a file or folder in tmp/, its record first, so that a rest of it is never used."""
    if path.is_dir() and not path.is_symlink():
        (path / STAGE).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
