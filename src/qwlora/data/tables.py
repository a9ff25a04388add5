"""Tables: CSV and TSV, Parquet, Arrow, folders that `datasets` saved, and the hub.

CSV is read with Python's own `csv`, so that a bad record has a line and `NA` or an empty field stays the text that it is (pandas makes both nan). Parquet and
Arrow are read with `pyarrow` where they lie (`datasets` would copy them into its cache first); folders and the hub with `datasets`. Both come with the extra
`data`. A row is counted from 1, as its file counts it.
"""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Collection, Iterator
from math import inf
from pathlib import Path
from types import ModuleType
from typing import Any

from qwlora.data.file_kinds import suffix_of
from qwlora.data.text_files import decode, read_bytes
from qwlora.errors import MissingExtraError, SourceError, foreign_as

Rows = Iterator[tuple[str, Any]]
SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")
_LARGEST_FIELD = 2**31 - 1
_ROWS_AT_ONCE = 1000
_HARMLESS_BYTES = 2**24


def read_csv(path: Path) -> tuple[list[str], Rows]:
    """Column names, and (`file:line`, row).

    Raises:
        SourceError: it has no header, a column twice, or a row that does not fit the header.
    """
    text = decode(read_bytes(path), path).removeprefix("\ufeff")
    between, delimiter = ("tab", "\t") if suffix_of(path) == ".tsv" else ("comma", ",")
    previous = csv.field_size_limit(_LARGEST_FIELD)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = [(line, row) for line, row in _numbered(reader, path) if row]
    finally:
        csv.field_size_limit(previous)
    if not lines:
        raise SourceError(f"{path}: the file is empty; its first line must name the columns")
    header = lines[0][1]
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise SourceError(f"{path}:1: two columns are named {twice[0]!r}")

    def rows() -> Rows:
        for line, row in lines[1:]:
            if len(row) != len(header):
                raise SourceError(
                    f"{path}:{line}: this record has {len(row)} fields, and the header {len(header)}; a field with a {between} in it needs quotes"
                )
            yield f"{path}:{line}", dict(zip(header, row, strict=True))

    return header, rows()


def _numbered(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line on which each begins."""
    line = 1
    try:
        for row in reader:
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise SourceError(f"{path}:{line}: this is not CSV: {error}") from error


def read_parquet(path: Path, unpack_limit: float | None = None) -> tuple[list[str], Any]:
    """Column names, and a function from the columns that are wanted to (`file row N`, row).

    Args:
        unpack_limit: see `_Unpacked`.

    Raises:
        SourceError: it is not a Parquet file.
        MissingExtraError: pyarrow is not installed.
    """
    _needed("pyarrow", path)
    parquet = _needed("pyarrow.parquet", path)
    with foreign_as(SourceError, f"{path}: this is not a Parquet file"):
        file = parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)

    def rows(wanted: Collection[str]) -> Rows:
        unpacked = _Unpacked(path, unpack_limit)
        unpacked.check(_declared_bytes(file.metadata, wanted))
        batches = file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(wanted))
        return _batches(batches, path, unpacked)

    return names, rows


def _declared_bytes(metadata: Any, wanted: Collection[str]) -> int:
    """What a Parquet file says that the columns `wanted` unpack to."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    columns = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema.partition(".")[0] in wanted
    )


def read_arrow(path: Path, unpack_limit: float | None = None) -> tuple[list[str], Any]:
    """The same for an Arrow file, in the stream or the file (Feather) format.

    Raises:
        SourceError: it is neither.
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow, ipc = _needed("pyarrow", path), _needed("pyarrow.ipc", path)
    with foreign_as(SourceError, f"{path}: this is not an Arrow file"):
        source = pyarrow.memory_map(str(path))
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        opened = ipc.open_file(source) if is_file else ipc.open_stream(source)

    def batches(wanted: Collection[str]) -> Iterator[Any]:
        found = map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened
        return (batch.select(list(wanted)) for batch in found)

    return list(opened.schema.names), lambda wanted: _batches(
        batches(wanted), path, _Unpacked(path, unpack_limit)
    )


class _Unpacked:
    """Counts what a compressed file unpacks to, and refuses the excess.

    Args:
        limit: times its size that a file may unpack to; None for no limit. `_HARMLESS_BYTES` are
            never too many.
    """

    def __init__(self, path: Path, limit: float | None):
        self.path, self.limit = path, limit
        self.size = path.stat().st_size
        self.most = inf if limit is None else max(limit * self.size, _HARMLESS_BYTES)

    def check(self, count: int) -> None:
        """Refuse `count` bytes in all.

        Raises:
            SourceError: they are too many.
        """
        if count > self.most:
            raise SourceError(
                f"{self.path}: the file has {self.size:,} bytes and unpacks to more than "
                f"{self.limit:g} times as many ({count:,} so far). If it is meant to, raise "
                "data.unpack_limit, or set it to null"
            )


def _batches(batches: Iterator[Any], path: Path, unpacked: _Unpacked) -> Rows:
    """Rows of record batches, few at a time: a value that a file holds once may be in each row."""
    number = in_batches = in_rows = 0
    iterator = iter(batches)
    while True:
        with foreign_as(SourceError, f"{path}: the file cannot be read after row {number}"):
            batch = next(iterator, None)
        if batch is None:
            return
        in_batches += batch.nbytes
        unpacked.check(in_batches)
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            with foreign_as(SourceError, f"{path}: the file cannot be read after row {number}"):
                rows = batch.slice(start, _ROWS_AT_ONCE).to_pylist()
            for row in rows:
                number += 1
                in_rows += _characters(row)
                unpacked.check(in_rows)
                yield f"{path} row {number}", _without_null(row)


def _characters(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str | bytes) else 1


def _without_null(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what its objects lack: all objects of a column have all keys that one of them has, and null for those that they have not."""

    def present(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: present(v) for key, v in value.items() if v is not None}
        return [present(v) for v in value] if isinstance(value, list) else value

    return {name: present(value) for name, value in row.items()}


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` saved this folder (`save_to_disk`)."""
    return any((path / name).is_file() for name in SAVED_DATASET)


def read_saved_dataset(path: Path, split: str | None) -> tuple[list[str], Any]:
    """The same for a folder of `save_to_disk`.

    Raises:
        SourceError: it cannot be loaded, or has not got that split.
        MissingExtraError: datasets is not installed.
    """
    datasets = _needed("datasets", path)
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # each version, builder and file system raises its own
        raise SourceError(
            f"{path}: this folder has {' or '.join(SAVED_DATASET)}, but datasets cannot load it: {error}"
        ) from error
    return _dataset_rows(loaded, str(path), split, datasets)


def read_hub(source: str, split: str | None, subset: str | None) -> tuple[list[str], Any]:
    """The same for a dataset on the hub, `owner/name`.

    Raises:
        SourceError: it cannot be loaded, or has not got that split.
        MissingExtraError: datasets is not installed.
    """
    datasets = _needed("datasets", source)
    try:
        loaded = datasets.load_dataset(source, name=subset)
    except Exception as error:  # the network, the hub, a builder: each raises its own
        raise SourceError(
            f"data source {source!r} is no file or folder here, and datasets cannot load it from the hub: {_first_line(error)}"
        ) from error
    return _dataset_rows(loaded, source, split, datasets)


def _dataset_rows(
    loaded: Any, source: str, split: str | None, datasets: ModuleType
) -> tuple[list[str], Any]:
    if isinstance(loaded, datasets.DatasetDict):
        names = list(loaded)
        wanted = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
        if wanted is None or wanted not in names:
            raise SourceError(
                f"{source}: {f'there is no split {split!r}' if split else 'it has several splits'}: set data.split to one of {', '.join(names)}"
            )
        loaded, source = loaded[wanted], f"{source}[{wanted}]"
    elif split is not None:
        raise SourceError(
            f"{source}: it has no splits, so data.split: {split} has no meaning; take it out of the recipe"
        )

    def rows(wanted: Collection[str]) -> Rows:
        table, number = iter(loaded.select_columns(list(wanted))), 0
        while True:
            with foreign_as(SourceError, f"{source}: it cannot be read after row {number}"):
                row = next(table, None)
            if row is None:
                return
            number += 1
            yield f"{source} row {number}", _without_null(row)

    return list(loaded.column_names), rows


def _needed(module: str, source: Any) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module.partition('.')[0]} is needed to read {str(source)!r} and is not installed: pip install 'qwlora[data]'"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
