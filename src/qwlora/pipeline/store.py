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

There is no journal: tmp/ exists only while a command changes something, or if one was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from qwlora.errors import DirectoryError, listed
from qwlora.formats.model_card import is_users_card, text_of
from qwlora.system.atomic import files_in, flush, flush_folder, write_text
from qwlora.system.output_path import as_directory_errors, lock_folder
from qwlora.system.regular_files import is_inside
from qwlora.system.seen import Seen, sealed, unsealed
from qwlora.targets.proof.contents import STAGE

CARD = "README.md"  # the model card in an artifact: for people, no input of any stage
STAGES, TMP = ".qwlora/stages", ".qwlora/tmp"
OLD, GONE = ".old", ".gone"  # in tmp/: an artifact that is being replaced, or removed
# Keys of a record's results that stand for the stage's adapter and text. So an adapter is renamed
# without a change to its results, and no name can be one of these.
NAME, TEXT_NAME = "*", "*text"
# Where artifacts and records without one are. A stage is known on disk by this path.
_PLACES = (
    *("base", "base_simulation", "adapters/*", "simulation/*"),
    *("export/*", "export/*/*", "export/*/proof/*", ".qwlora/sampled", ".qwlora/reference/*"),
    f"{STAGES}/**/*.json",
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
        # The files count as well: with one key, two machines may round differently.
        return _digest([self.key, self.files])

    def text(self) -> str:
        return sealed(asdict(self))


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(file: Path) -> Record | None:
    """The record in `file`; None if it is missing, damaged, or lists a file outside its folder."""
    empty = Record("", {}, {})
    try:
        record = Record(**(unsealed(file) or {}))
    except TypeError:
        return None
    # The job may come from a stranger, and commands hash and upload the files that a record lists.
    is_whole = all(type(value) is type(getattr(empty, key)) for key, value in vars(record).items())
    paths = [Path(name) for name in record.files] if is_whole else [Path("/")]
    return None if any(p.is_absolute() or ".." in p.parts for p in paths) else record


class Store:
    """The artifacts and records of one job.

    Attributes:
        records: by the path of the artifact, or of the file in `STAGES`, relative to the job.
        damaged: paths whose stage.json cannot be read.
    """

    def __init__(self, path: Path):
        self.path, self.private = path, path / ".qwlora"
        self.seen = Seen(self.private / "seen.json")
        self.reload()

    def reload(self) -> None:
        self.records: dict[str, Record] = {}
        self.damaged: set[str] = set()
        places = (path for pattern in _PLACES for path in self.path.glob(pattern))
        for place in sorted(str(path.relative_to(self.path)) for path in places):
            file = self._file(place)
            # Behind a link are files of somebody else, which must not be moved or deleted.
            if os.path.lexists(file) and is_inside(self.path, place):
                if (record := read_record(file)) is None:
                    self.damaged.add(place)
                else:
                    self.records[place] = record

    def _file(self, place: str) -> Path:
        is_file = place.startswith(f"{STAGES}/")
        return self.path / place if is_file else self.path / place / STAGE

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
        if not self.is_writable:
            raise DirectoryError(f"{str(self.path)!r} is not writable; choose another --out")

    def check_unclaimed(self) -> None:
        """Check that the directory is new or empty."""
        with as_directory_errors(self.path):
            inside = {*os.listdir(self.path)} if self.path.is_dir() else set()
            if ".qwlora" in inside:
                inside |= {f".qwlora/{name}" for name in os.listdir(self.private)}
            # A command that is killed before it has written a recipe leaves these.
            if inside - {".qwlora", ".qwlora/lock", ".recipe.yaml.part"}:
                raise DirectoryError(
                    f"{str(self.path)!r} is not empty and was not made by qwlora (it has no "
                    "recipe.yaml next to .qwlora); choose another --out"
                )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the job's lock. If no recipe was written meanwhile, nothing stays."""
        self.check_writable()
        with as_directory_errors(self.path), lock_folder(self.private, self.path):
            # Until now, another process may have changed the records.
            self.reload()
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # it is not empty, or there is none
                    (self.path / TMP).rmdir()
                if not (self.path / "recipe.yaml").is_file():
                    shutil.rmtree(self.private, ignore_errors=True)

    def version(self, place: str) -> str:
        """`Record.version` of what is at `place`; empty if nothing is."""
        record = self.records.get(place)
        return "" if record is None else record.version

    def problem(self, place: str) -> str | None:
        """Why the files at `place` are not those of its record; None if they are."""
        record = self.records[place]
        problems = []
        for name, digest in record.files.items():
            file = self.path / place / name
            if (current := self.seen.content(file)) is None:
                reason = "cannot be read" if file.exists() else "is missing"
                problems.append(f"{place}/{name} {reason}")
            elif current != digest:
                problems.append(f"{place}/{name} has changed")
        return listed(problems, 3) if problems else None

    def check_replaceable(self, place: str, new: Collection[str] = ()) -> None:
        """Check that everything at `place` was made by this job: a record lists it. If the record
        is damaged, the `new` files that take the place say what is; if they are unknown, all is."""
        target, is_damaged = self.path / place, place in self.damaged
        is_record = place.startswith(f"{STAGES}/")
        if is_record or not os.path.lexists(target) or (is_damaged and not new):
            return
        inside = {p: r for p, r in self.records.items() if p == place or p.startswith(f"{place}/")}
        known = {f"{p}/{name}" for p, record in inside.items() for name in (*record.files, STAGE)}
        known |= {f"{place}/{name}" for name in (*new, STAGE)} if is_damaged else set()
        if not target.is_dir() or target.is_symlink():
            problem = "exists and is not a folder"
        else:
            # A link counts as a file and is not followed: its target is somebody else's.
            files = (path for path in target.rglob("*") if path.is_symlink() or not path.is_dir())
            names = sorted(str(path.relative_to(target)) for path in files)
            # No record lists the card. If the user edited it, `commit` keeps it.
            foreign = [n for n in names if f"{place}/{n}" not in known and n != CARD]
            if not foreign:
                return
            more = f" and {len(foreign) - 1} more files" if len(foreign) > 1 else ""
            problem = f"contains {foreign[0]!r}{more}"
        raise DirectoryError(
            f"{str(target)!r} {problem}, which this job did not write, but would overwrite. "
            "Nothing was changed. Move it out of the job's directory and run again."
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
            files = {name: digests.content(scratch / name) or "" for name in names if name != CARD}
            record = replace(record, files=files)
            if is_users_card(self.path / place / CARD):
                shutil.copy2(self.path / place / CARD, scratch / CARD)
            # stage.json comes last: after a kill, a folder in tmp/ that has one is complete, and
            # `finish` puts it in place.
            flush(scratch)
            write_text(scratch / STAGE, record.text())
            flush_folder(scratch)
            old = self._tmp(place, OLD)
            _discard(old)
            if (self.path / place).exists():
                (self.path / place).rename(old)
            self._rename(scratch, self.path / place)
            _discard(old)
            # Artifacts inside, such as proofs, went with the old one.
            for inside in [p for p in self.records if p.startswith(f"{place}/")]:
                del self.records[inside]
        self.records[place] = record
        self.damaged.discard(place)
        return record

    def change(self, place: str, **fields: Any) -> None:
        self.records[place] = record = replace(self.records[place], **fields)
        with as_directory_errors(self.path):
            write_text(self._file(place), record.text())

    @contextlib.contextmanager
    def removing(self, places: Collection[str]) -> Iterator[None]:
        """Delete artifacts or records when the block ends, or put them back if it raises."""
        try:
            for place in filter(lambda place: os.path.lexists(self.path / place), places):
                _discard(self._tmp(place, GONE))
                self._rename(self.path / place, self._tmp(place, GONE))
                self.records.pop(place, None)
                self.damaged.discard(place)
            yield
        except BaseException:
            self.finish(places)
            raise
        self.finish()

    def move(self, moves: Mapping[str, str]) -> None:
        """Rename artifacts, from and to, each in one step; they may change places."""
        for new in moves.values():
            self.check_replaceable(new)
        # After a kill, the folder is still there, and the next command finishes the moves.
        (self.path / TMP).mkdir(exist_ok=True)
        with self.removing([new for new in moves.values() if new not in moves]):
            pass
        left = dict(moves)
        while left:
            old = next((old for old, new in left.items() if new not in left), "")
            if not old:
                # In a cycle, one of them waits under a name that no adapter can have.
                old, new = left.popitem()
                left[waiting := f"{old.removesuffix('.json')}.moved{Path(old).suffix}"] = new
                self._rename(self.path / old, self.path / waiting)
                self.records[waiting] = self.records.pop(old)
                continue
            new = left.pop(old)
            self._rename(self.path / old, self.path / new)
            self.records[new] = self.records.pop(old)

    def finish(self, planned: Collection[str] = ()) -> None:
        """Put complete artifacts in tmp/ in place, unless something is there, and delete the rest.
        Artifacts that were being removed are put back if their place is in `planned`."""
        folder = self.path / TMP
        waiting = sorted(folder.iterdir()) if folder.is_dir() else []
        # New artifacts come first: a kill may have left both versions without a place.
        for path in sorted(waiting, key=lambda path: path.name.endswith(OLD)):
            is_gone = path.name.endswith(GONE)
            place = unquote(path.name.removesuffix(OLD).removesuffix(GONE))
            record = read_record(path / STAGE if path.is_dir() else path)
            # What was being removed returns if that failed, or the recipe on the disk still has it.
            is_wanted = place in planned if is_gone else record is not None
            is_plain = not path.is_symlink() and is_inside(self.path, place)
            if is_wanted and is_plain and not os.path.lexists(self.path / place):
                self._rename(path, self.path / place)
                self.records |= {} if record is None else {place: record}
            else:
                _discard(path)

    def _tmp(self, place: str, kind: str = "") -> Path:
        return self.path / TMP / f"{quote(place, safe='')}{kind}"

    def _rename(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        flush_folder(source.parent)
        flush_folder(target.parent)

    def write_card(self, place: str, text: str) -> None:
        """Write the model card of an artifact, unless it has this text or the user edited it."""
        card = self.path / place / CARD
        if card.parent.is_dir() and not is_users_card(card) and text_of(card) != text:
            write_text(card, text)

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


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        # The record goes first: after a kill, `finish` must not take the rest for complete.
        (path / STAGE).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
