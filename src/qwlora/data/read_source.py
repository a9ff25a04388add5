"""A source to the list of its documents.

    ./file.txt, .md, or any other        one document, running text; what holds records but is not read is refused (`names.py`)
    ./file.jsonl, .jsonlines, .ndjson    a document for each line
    ./file.json                          a document for each record of a list, or for each line
    ./file.csv, .tsv                     a document for each row
    ./file.parquet, .arrow, .feather
    ./folder                             what `datasets.save_to_disk` wrote, or the files of the kinds above below it (`folder.py`)
    python:MODULE:ATTRIBUTE              strings in an installed Python module (a mapping's values, a sequence, or one string)
    owner/name                           a dataset on the Hugging Face hub

All documents of a source are of one kind.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwlora import errors
from qwlora.data import tables
from qwlora.data.document import Document, Text
from qwlora.data.file_kinds import (
    JSON_LINES_SUFFIXES,
    RECORD_SUFFIXES,
    SUFFIXES,
    refusal,
    suffix_of,
)
from qwlora.data.folder_files import folder_files
from qwlora.data.records import Columns, EmptyRecordError, Fields, choose_fields, make_document
from qwlora.data.text_files import read_attribute, read_file, read_json, read_json_lines
from qwlora.errors import SourceError
from qwlora.formats.user_path import user_path


@dataclass(frozen=True)
class Reading:
    """What the recipe says about a source besides its name.

    Args:
        split, subset: of a dataset that has several.
        skip_empty: leave records out that are empty, instead of refusing them.
        unpack_limit: times its size that a Parquet or Arrow file may unpack to; None for no limit.
    """

    columns: Columns = Columns()
    split: str | None = None
    subset: str | None = None
    skip_empty: bool = False
    unpack_limit: float | None = 20.0


def locate_documents(source: str) -> None:
    """See that `source` exists, without reading it.

    Raises:
        SourceError: it does not.
    """
    if source.startswith("python:"):
        module_name, _, attribute = source.removeprefix("python:").partition(":")
        try:
            found = bool(attribute) and importlib.util.find_spec(module_name) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            raise SourceError(
                f"data source {source!r} is not python:MODULE:ATTRIBUTE of an installed module"
            )
    elif not user_path(source).exists() and not _is_hub_id(source):
        raise SourceError(
            f"data source {source!r} does not exist. Give a file (text, {', '.join(RECORD_SUFFIXES)}), a folder of such files "
            "or of datasets.save_to_disk, python:MODULE:ATTRIBUTE, or a dataset's hub id like owner/name"
        )


def _is_hub_id(source: str) -> bool:
    """`owner/name`, and not what is more likely a path with a mistake in it."""
    if source.startswith(".") or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return False
    return suffix_of(Path(source)) not in SUFFIXES and refusal(Path(source)) is None


@dataclass
class _Reader:
    """Collects documents; the first record decides which fields all have."""

    reading: Reading
    documents: list[Document] = field(default_factory=list)
    skipped: int = 0
    fields: Fields | None = None

    def records(self, rows: Iterable[tuple[str, Any]]) -> None:
        for where, record in rows:
            try:
                if self.fields is None and isinstance(record, dict) and record:
                    self.fields = choose_fields(record, self.reading.columns, where)
                self.documents.append(
                    make_document(record, self.fields or Fields("text", {"text": "text"}), where)
                )
            except EmptyRecordError as error:
                if not self.reading.skip_empty:
                    raise SourceError(
                        f"{error}. Take the record out, or set data.empty_records: skip"
                    ) from error
                self.skipped += 1

    def file(self, path: Path) -> None:
        with errors.reading(path):
            self._file(path)

    def _file(self, path: Path) -> None:
        if why := refusal(path):
            raise SourceError(f"data source {str(path)!r}: {why}")
        suffix = suffix_of(path)
        if suffix in JSON_LINES_SUFFIXES:
            self.records(read_json_lines(path))
        elif suffix == ".json":
            self.records(read_json(path))
        elif suffix in (".csv", ".tsv"):
            names, rows = tables.read_csv(path)
            self.use(names, str(path))
            self.records(rows)
        elif suffix == ".parquet":
            self.table(*tables.read_parquet(path, self.reading.unpack_limit), str(path))
        elif suffix in (".arrow", ".feather"):
            self.table(*tables.read_arrow(path, self.reading.unpack_limit), str(path))
        else:
            self._no_columns(f"data source {str(path)!r}")
            self.documents.append(Text(read_file(path), str(path)))

    def use(self, names: list[str], where: str) -> Fields:
        """Fix the fields by the columns of a table."""
        found = choose_fields(names, self.reading.columns, where)
        if self.fields is not None and found != self.fields:
            raise SourceError(
                f"{where}: this table has {'+'.join(found.columns)}, what was read before it {'+'.join(self.fields.columns)}; a source holds one kind"
            )
        self.fields = found
        return found

    def table(self, names: list[str], rows: Any, where: str) -> None:
        self.records(rows(self.use(names, where).among(names)))

    def folder(self, path: Path) -> None:
        if tables.is_saved_dataset(path):
            self.table(*tables.read_saved_dataset(path, self.reading.split), str(path))
            return
        for file in folder_files(path, self.reading.split):
            self.file(file)

    def _no_split(self, where: str) -> None:
        if self.reading.split is not None:
            raise SourceError(
                f"{where} has no splits, so data.split: {self.reading.split} has no meaning; take it out of the recipe"
            )

    def _no_columns(self, where: str) -> None:
        if asked := self.reading.columns.asked:
            raise SourceError(
                f"{where} is running text and has no columns; take data.{next(iter(asked))}_column out of the recipe"
            )


def read_documents(source: str, how: Reading) -> tuple[list[Document], int]:
    """All documents of `source`, and how many empty records were left out.

    Raises:
        SourceError: something is wrong with it; a bad record is named with file and line.
        MissingExtraError: what reads it is not installed.
    """
    reader, path = _Reader(how), user_path(source)
    if source.startswith("python:"):
        reader._no_split(f"data source {source!r}")
        reader._no_columns(f"data source {source!r}")
        reader.documents.extend(read_attribute(source))
    elif path.is_dir():
        reader.folder(path)
    elif path.exists() or not _is_hub_id(source):
        reader._no_split(f"data source {source!r}")
        reader.file(path)
    else:
        reader.table(*tables.read_hub(source, how.split, how.subset), source)
    documents = [d for d in reader.documents if not isinstance(d, Text) or d.text.strip()]
    if not documents:
        raise SourceError(
            f"data source {source!r} holds no text: {'every document in it is empty' if reader.documents else 'no record is in it'}"
        )
    return documents, reader.skipped
