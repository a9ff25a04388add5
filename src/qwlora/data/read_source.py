"""Read the documents of a source.

    ./file.txt, .md, or any other        one document, running text; unreadable kinds of records are
                                         refused (`source_files.py`)
    ./file.jsonl, .jsonlines, .ndjson    one document per line
    ./file.json                          one document per element of its list, or line
    ./file.csv, .tsv                     one document per row
    ./file.parquet, .arrow, .feather     one document per row
    ./folder                             saved by `datasets.save_to_disk`, or files of the kinds
                                         above, subfolders included
    python:MODULE:ATTRIBUTE              strings in an installed Python module (one string, a
                                         sequence, or a mapping's values)
    owner/name                           a dataset on the Hugging Face hub

All documents of a source are of one kind.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwlora import errors
from qwlora.data import tabular_files
from qwlora.data.document import Document, Text
from qwlora.data.records import EmptyRecordError, Fields, choose_fields, make_document
from qwlora.data.source_files import RECORD_SUFFIXES, TEXT_SUFFIXES, folder_files, refusal
from qwlora.data.text_files import read_attribute, read_json, read_text
from qwlora.errors import SourceError
from qwlora.formats.user_path import does_not_exist, user_path


@dataclass(frozen=True)
class Reading:
    """How the recipe wants a source to be read.

    Args:
        columns: column of each field that is not found by its name.
        split, subset: which ones of a dataset that has several.
        skip_empty: skip empty records instead of refusing them.
    """

    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    split: str | None = None
    subset: str | None = None
    skip_empty: bool = False


def locate_documents(source: str) -> None:
    """Check that `source` exists, without reading it.

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
            f"data source {source!r} {does_not_exist(source, user_path(source))}. Give a file "
            f"(text, {', '.join(RECORD_SUFFIXES)}), a folder of such files or of "
            "datasets.save_to_disk, python:MODULE:ATTRIBUTE, or a dataset's hub id like owner/name"
        )


def _is_hub_id(source: str) -> bool:
    """Whether `source` is `owner/name`, and not more likely a mistyped path."""
    if source.startswith(".") or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return False
    known = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
    return Path(source).suffix.lower() not in known and refusal(Path(source)) is None


@dataclass
class _Reader:
    """Collects documents; the first record determines the fields of all."""

    reading: Reading
    documents: list[Document] = field(default_factory=list)
    skipped: int = 0
    fields: Fields | None = None

    def add_records(self, rows: Iterable[tuple[str, Any]]) -> None:
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
                        f"{error}. Remove the record, or set data.empty_records: skip"
                    ) from error
                self.skipped += 1

    def read_file(self, path: Path) -> None:
        with errors.reading(path):
            self._file(path)

    def _file(self, path: Path) -> None:
        if why := refusal(path):
            raise SourceError(f"data source {str(path)!r}: {why}")
        suffix = path.suffix.lower()
        if suffix in (".csv", ".tsv"):
            names, rows = tabular_files.read_csv(path)
            self.set_fields(names, str(path))
            self.add_records(rows)
        elif suffix in (".parquet", ".arrow", ".feather"):
            self.add_table(tabular_files.read_arrow(path), str(path))
        elif suffix in RECORD_SUFFIXES:
            self.add_records(read_json(path))
        else:
            self.refuse_columns(f"data source {str(path)!r}")
            self.documents.append(Text(read_text(path), str(path)))

    def set_fields(self, names: list[str], where: str) -> Fields:
        """Determine the fields from the columns of a table."""
        found = choose_fields(names, self.reading.columns, where)
        if self.fields is not None and found != self.fields:
            raise SourceError(
                f"{where}: this table has {'+'.join(found.columns)}, the files before it "
                f"{'+'.join(self.fields.columns)}. A source holds one kind: move the others to "
                "another folder"
            )
        self.fields = found
        return found

    def add_table(self, table: tabular_files.Table, where: str) -> None:
        names, rows = table
        self.add_records(rows(self.set_fields(names, where).among(names)))

    def refuse_split(self, where: str) -> None:
        if self.reading.split is not None:
            raise SourceError(
                f"{where} has no splits; remove data.split: {self.reading.split} from the recipe"
            )

    def refuse_columns(self, where: str) -> None:
        if asked := self.reading.columns:
            raise SourceError(
                f"{where} is running text and has no columns; remove "
                f"data.{next(iter(asked))}_column from the recipe"
            )


def read_documents(source: str, how: Reading) -> tuple[list[Document], int]:
    """All documents of `source`, and the number of empty records that were skipped.

    Raises:
        SourceError: it cannot be read; a bad record is named with file and line.
        MissingExtraError: the package that reads this kind of source is not installed.
    """
    reader, path, where = _Reader(how), user_path(source), f"data source {source!r}"
    if source.startswith("python:"):
        reader.refuse_split(where)
        reader.refuse_columns(where)
        reader.documents.extend(read_attribute(source))
    elif tabular_files.is_saved_dataset(path):
        reader.add_table(tabular_files.read_dataset(str(path), how.split), str(path))
    elif path.is_dir():
        for file in folder_files(path, how.split):
            reader.read_file(file)
    elif path.exists() or not _is_hub_id(source):
        reader.refuse_split(where)
        reader.read_file(path)
    else:
        reader.add_table(tabular_files.read_dataset(source, how.split, how.subset), source)
    documents = [d for d in reader.documents if not isinstance(d, Text) or d.text.strip()]
    if not documents:
        raise SourceError(
            f"data source {source!r} holds no text: "
            f"{'every document is empty' if reader.documents else 'it has no records'}"
        )
    return documents, reader.skipped
