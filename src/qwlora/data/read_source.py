"""Find the files of a source, and read their documents, which must be of one kind.

docs/data.md lists the sources. In a folder, all visible files of these kinds are read, or those
named after the split. Compressed files and spreadsheets among them are an error. Files of other
kinds (images, code, checksums) are ignored.
"""

from __future__ import annotations

import ast
import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.abc import InspectLoader
from pathlib import Path
from typing import Any

from qwlora import errors
from qwlora.data.document import Document, Documents, Text, split_documents, without_repeated
from qwlora.data.records import (
    TEXT_COLUMNS,
    Columns,
    EmptyRecordError,
    choose_columns,
    make_document,
)
from qwlora.data.rows import (
    SAVED_DATASET,
    Table,
    read_arrow,
    read_csv,
    read_dataset,
    read_json,
    read_text,
)
from qwlora.errors import SourceError, foreign_as, listed
from qwlora.formats.model_source import installed_module, is_hub_id, looked_for, user_path

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (
    *(".jsonl", ".jsonlines", ".ndjson", ".json"),
    *(".csv", ".tsv", ".parquet", ".arrow", ".feather"),
)
_REMEDIES = {
    r"\.(gz|tgz|bz2|xz|zst|zip|tar|7z|rar|lz4|lzma|br)": "unpack it first",
    r"\.(xlsx|xls|ods|orc|avro|pkl|pickle|sqlite3?|tfrecord)": (
        "save its records as .jsonl, .csv or .parquet"
    ),
}
# Longest first, so that a.jsonl.bak matches .jsonl, not .json.
_RECORD_WITHIN = re.compile(
    rf"({'|'.join(map(re.escape, sorted(RECORD_SUFFIXES, key=len, reverse=True)))})(?![a-z])"
)
_CARDS = ("readme", "license")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Reading:
    """How to read a source.

    Args:
        columns: column name of each field that has another name in the source.
        split, subset: split and subset of a dataset that has several.
        skip_empty: skip empty records instead of refusing them.
        keep_repeated: allow the same content in the training and the held-out part.
        evaluation: source of the held-out documents, or a split of the same source.
    """

    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    split: str | None = None
    subset: str | None = None
    skip_empty: bool = False
    keep_repeated: bool = False
    evaluation: str | None = None


def locate_documents(source: str) -> None:
    """Check that `source` exists, without reading it; raise SourceError if it does not."""
    if source.startswith("python:"):
        _constant_of_module(source)
    elif not user_path(source).exists() and not _is_dataset_id(source):
        raise SourceError(
            f"data source {source!r} does not exist{looked_for(source, user_path(source))}. Give "
            f"a file (text, {', '.join(RECORD_SUFFIXES)}), a folder of such files or of "
            "datasets.save_to_disk, python:MODULE:ATTRIBUTE, or a dataset's hub id like owner/name"
        )


def load_documents(
    source: str, held_out: float = 0.2, seed: int = 0, reading: Reading | None = None
) -> Documents:
    """Read a source, and split it into training and held-out documents.

    Raises SourceError.
    """
    how = reading or Reading()
    documents, skipped, unused = read_documents(source, how)
    if how.evaluation is None:
        parts = split_documents(documents, held_out, seed)
    else:
        is_split = is_name_of_split(how.evaluation)
        other, split = (source, how.evaluation) if is_split else (how.evaluation, None)
        held, skipped_too, _ = read_documents(other, replace(how, split=split))
        if held[0].kind != documents[0].kind:
            raise SourceError(
                f"data.evaluation {how.evaluation!r} holds {held[0].kind}, but data.source "
                f"{source!r} holds {documents[0].kind}. Give both the same columns"
            )
        parts, skipped = (tuple(documents), tuple(held)), skipped + skipped_too
    both = (Documents if how.keep_repeated else without_repeated)(*parts, skipped)
    return replace(both, unused_columns=unused)


def is_name_of_split(evaluation: str) -> bool:
    """Whether `data.evaluation` names a split of `data.source`, not another source."""
    return re.fullmatch(r"\w+", evaluation) is not None and not user_path(evaluation).exists()


def read_documents(source: str, how: Reading) -> tuple[list[Document], int, tuple[str, ...]]:
    """All documents of `source`, the number of empty records that were skipped, and the columns
    with text that is in no document.

    Raises:
        SourceError: the source is missing or empty, or a record is bad (with its file and line).
    """
    reader, path = _Reader(how), user_path(source)
    is_module = source.startswith("python:")
    is_file = not is_module and not path.is_dir() and (path.exists() or not _is_dataset_id(source))
    if how.split is not None and (is_module or is_file):
        raise SourceError(
            f"data source {source!r} has no splits, but data.split is {how.split!r}: set it to null"
        )
    if is_module:
        reader.add_texts(_strings_of_module(source), f"data source {source!r}")
    elif is_file:
        reader.add_file(path)
    elif not path.is_dir():
        reader.add_table(read_dataset(source, how.split, how.subset), source)
    elif any((path / name).is_file() for name in SAVED_DATASET):
        reader.add_table(read_dataset(str(path), how.split), str(path))
    else:
        for file in _files_of(path, how.split):
            reader.add_file(file)
    documents = [d for d in reader.documents if not isinstance(d, Text) or d.text.strip()]
    if not documents:
        raise SourceError(
            f"data source {source!r} holds no text: "
            f"{'every document is empty' if reader.documents else 'it has no records'}"
        )
    return documents, reader.skipped, tuple(reader.unused)


@dataclass
class _Reader:
    """Collects documents. The first record determines the columns of all records."""

    reading: Reading
    documents: list[Document] = field(default_factory=list)
    skipped: int = 0
    columns: Columns | None = None
    unused: dict[str, None] = field(default_factory=dict)  # as a set that keeps its order

    def add_file(self, path: Path) -> None:
        if why := _refusal(path):
            raise SourceError(f"data source {str(path)!r}: {why}")
        suffix = path.suffix.lower()
        with errors.reading(path):
            if suffix in (".csv", ".tsv"):
                names, rows = read_csv(path)
                self.add_table((names, lambda _: rows), str(path))
            elif suffix in (".parquet", ".arrow", ".feather"):
                self.add_table(read_arrow(path), str(path))
            elif suffix in RECORD_SUFFIXES:
                self.add_records(read_json(path))
            else:
                text = Text(read_text(path), str(path))
                self.add_texts([text], f"data source {str(path)!r}")

    def add_texts(self, texts: Sequence[Text], where: str) -> None:
        for column in self.reading.columns:
            raise SourceError(
                f"{where} is running text and has no columns; set data.{column}_column to null"
            )
        self.documents += texts

    def add_table(self, table: Table, where: str) -> None:
        names, rows = table
        columns = choose_columns(names, self.reading.columns, where)
        if self.columns not in (None, columns):
            raise SourceError(
                f"{where}: this table has {'+'.join(columns)}, the files before it "
                f"{'+'.join(self.columns or ())}. A source holds one kind: move the others to "
                "another folder"
            )
        self.columns = columns
        self.add_records(rows([name for name in columns.values() if name in names]))

    def add_records(self, rows: Iterable[tuple[str, Any]]) -> None:
        for where, record in rows:
            if self.columns is None and isinstance(record, dict) and record:
                self.columns = choose_columns(record, self.reading.columns, where)
            try:
                used = self.columns or TEXT_COLUMNS
                self.documents.append(make_document(record, used, where))
                # A single word is an identifier or a label.
                others = record.keys() - used.values() - self.unused.keys()
                texts = (n for n in sorted(others) if isinstance(record[n], str))
                self.unused |= dict.fromkeys(n for n in texts if " " in record[n].strip())
            except EmptyRecordError as error:
                if not self.reading.skip_empty:
                    raise SourceError(
                        f"{error}. Remove the record, or set data.empty_records: skip"
                    ) from error
                self.skipped += 1


def _constant_of_module(source: str) -> Any:
    """The value of a constant, read from the source code of an installed module."""
    # Importing the module would run its code, and the recipe may be a stranger's.
    module_name, _, attribute = source.removeprefix("python:").partition(":")
    spec = installed_module(module_name)
    with foreign_as(SourceError, f"data source {source!r} cannot be read"):
        loader = spec.loader if spec else None
        code = loader.get_source(spec.name) if spec and isinstance(loader, InspectLoader) else None
        tree = ast.parse(code or "")
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == attribute]
    stored = [name for name in names if isinstance(name.ctx, ast.Store)]
    values = [
        statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        and any(name in ast.iter_child_nodes(statement) for name in stored)
    ]
    # After a second assignment or a `+=`, the module has another value than the first.
    if len(stored) != 1 or not values:
        raise SourceError(
            f"data source {source!r}: python:MODULE:ATTRIBUTE needs an installed module whose "
            "source code assigns a constant to ATTRIBUTE exactly once. Modules are not run; save "
            "computed text as a file"
        )
    with foreign_as(SourceError, f"data source {source!r} is not a constant", "save it as a file"):
        return ast.literal_eval(values[0] or "")


def _strings_of_module(source: str) -> list[Text]:
    value = _constant_of_module(source)
    if isinstance(value, str):
        return [Text(value, source)]
    texts = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise SourceError(
            f"data source {source!r} is a {type(value).__name__}; it must be a string, or a "
            "sequence or mapping of strings"
        )
    return [Text(text, f"{source}[{i}]") for i, text in enumerate(texts)]


def _is_dataset_id(source: str) -> bool:
    """Whether `source` is `owner/name`, and not more likely a mistyped path."""
    if not is_hub_id(source):
        return False
    # `data/train.jsonl` is more likely a missing file than a dataset of the user `data`.
    known = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
    return Path(source).suffix.lower() not in known and _refusal(Path(source)) is None


def _refusal(file: Path) -> str | None:
    """Why a file of this name is refused and what to do; None if it can be read."""
    if file.suffix.lower() in (*TEXT_SUFFIXES, *RECORD_SUFFIXES):
        return None
    # A file of unknown kind is read as running text, and so would be a.jsonl.bak.
    if (within := _RECORD_WITHIN.search(file.name.lower())) and not _remedy(file):
        return (
            f"its name contains {within[1]} but does not end in it: rename it to end in "
            f"{within[1]}, or in .txt if it is running text"
        )
    return _remedy(file)


def _remedy(file: Path) -> str | None:
    """What to do with a compressed file or a spreadsheet; None for other files."""
    suffix = file.suffix.lower()
    remedies = (remedy for kinds, remedy in _REMEDIES.items() if re.fullmatch(kinds, suffix))
    return next((f"{suffix} files are not read: {remedy}" for remedy in remedies), None)


def _files_of(folder: Path, split: str | None) -> list[Path]:
    """The files of `folder` that hold its documents (or those of `split`), all of one kind."""
    where = f"data folder {str(folder)!r}"

    def named(files: Iterable[Path], most: int = 1) -> str:
        return listed((file.relative_to(folder).as_posix() for file in files), most)

    # `glob` skips hidden files and follows links to folders, which `Path.rglob` of Python 3.11 does
    # not. A link may lead to a folder that was already read.
    paths = map(folder.joinpath, glob.glob("**", root_dir=folder, recursive=True))
    once = {(os.path.realpath(p.parent), p.name): p for p in sorted(paths, reverse=True)}
    visible = sorted(p for p in once.values() if p.is_file())
    texts = [p for p in visible if p.suffix.lower() in TEXT_SUFFIXES]
    # Older releases of `datasets` wrote dataset_infos.json, a description, next to the records.
    records = [
        p for p in visible if p.suffix.lower() in RECORD_SUFFIXES and p.name != "dataset_infos.json"
    ]
    unreadable = [p for p in visible if _remedy(p)]
    # Dataset cards next to records are ignored: nobody should train on a card because the records
    # cannot be read. In a folder of running text, they count as text.
    contents = [p for p in texts if p.stem.lower() not in _CARDS]
    if records or unreadable or (not contents and len(texts) < len(visible)):
        texts = contents
    if not (files := sorted([*records, *unreadable, *texts])):
        raise SourceError(
            f"{where} holds no file of a supported kind ("
            f"{', '.join((*TEXT_SUFFIXES, *RECORD_SUFFIXES))}); it holds {named(visible, 4)}. Save "
            "its records as one of these. To train on a dataset's card, name its file"
        )
    # As on the hub, file names (`my_test.jsonl`, `train-00000-of-00001.parquet`) or else folder
    # names (`train/0.jsonl`) contain the split or a synonym between separators.
    if split is not None:
        words = "|".join(map(re.escape, _SPLITS.get(split, (split,))))
        of_split = re.compile(rf"(?:^|[-._ 0-9/])(?:{words})(?:[-._ 0-9/]|$)")
        chosen = [p for p in files if of_split.search(p.name)] or [
            p for p in files if of_split.search(p.relative_to(folder).parent.as_posix())
        ]
        if not chosen:
            raise SourceError(
                f"{where}: no file or folder in it is named after the split {split!r} "
                f"(like {split}-0.parquet or {split}/0.parquet); there are {named(files, 4)}. "
                "Correct data.split, or remove it to read all files"
            )
        files = chosen
    if wrong := [p for p in files if p in unreadable]:
        raise SourceError(
            f"{where} holds {named(wrong)}: {_remedy(wrong[0])}; or move it out of the folder"
        )
    kinds = {p in records: p.name for p in reversed(files)}
    if len(kinds) == 2:
        raise SourceError(
            f"{where} holds running text ({kinds[False]}) and records ({kinds[True]}). Move one "
            "kind to another folder"
        )
    return files
