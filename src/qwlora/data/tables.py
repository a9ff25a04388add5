"""Tables: CSV and TSV, Parquet, Arrow, folders saved by `datasets`, and the hub.

CSV is read with Python's own `csv`, so that a bad record is named by its line, and `NA` or an empty
field stays text (pandas, which `datasets` uses, makes both null and numbers of digits). Parquet and
Arrow are read in place with `pyarrow` (`datasets` would first copy them into its cache, without a
limit on what they unpack to). `datasets` reads its own folders and the hub. Both packages are in
the extra `data`. Rows are counted from 1.
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
from qwlora.encodings.model import repeated
from qwlora.errors import MissingExtraError, SourceError, foreign_as
from qwlora.formats.user_path import looked_for

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
        raise SourceError(f"{path}: the file is empty. Its first line must name the columns")
    header = lines[0][1]
    if twice := repeated(header):
        raise SourceError(f"{path}:1: two columns are named {twice[0]!r}")

    def rows() -> Rows:
        for line, row in lines[1:]:
            if len(row) != len(header):
                raise SourceError(
                    f"{path}:{line}: this record has {len(row)} fields, and the header "
                    f"{len(header)}. Quote fields that contain a {between}"
                )
            yield f"{path}:{line}", dict(zip(header, row, strict=True))

    return header, rows()


def _numbered(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of their first line."""
    line = 1
    try:
        for row in reader:
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise SourceError(f"{path}:{line}: this is not CSV: {error}") from error


def read_parquet(path: Path, unpack_limit: float | None = None) -> tuple[list[str], Any]:
    """Column names, and a function from the wanted columns to (`file row N`, row).

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
    """Unpacked size of the columns `wanted`, as the Parquet file declares it."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    columns = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema.partition(".")[0] in wanted
    )


def read_arrow(path: Path, unpack_limit: float | None = None) -> tuple[list[str], Any]:
    """Same as `read_parquet` for an Arrow file, in the stream or the file (Feather) format.

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
    """Limits what a compressed file may unpack to.

    Args:
        limit: allowed multiple of the file's size; None for no limit. `_HARMLESS_BYTES` are
            always allowed.
    """

    def __init__(self, path: Path, limit: float | None):
        self.path, self.limit = path, limit
        self.size = path.stat().st_size
        self.most = inf if limit is None else max(limit * self.size, _HARMLESS_BYTES)

    def check(self, count: int) -> None:
        """Check a total of `count` unpacked bytes.

        Raises:
            SourceError: they exceed the limit.
        """
        if count > self.most:
            raise SourceError(
                f"{self.path}: the file has {self.size:,} bytes and unpacks to more than "
                f"{self.limit:g} times as many ({count:,} so far). If that is intended, raise "
                "data.unpack_limit, or set it to null"
            )


def _batches(batches: Iterator[Any], path: Path, unpacked: _Unpacked) -> Rows:
    """Rows of record batches, `_ROWS_AT_ONCE` at a time: a value stored once in the file
    (dictionary encoding) may occur in every row."""
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
    """A row without null keys: a column's objects all have the keys that any of them has."""

    def present(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: present(v) for key, v in value.items() if v is not None}
        return [present(v) for v in value] if isinstance(value, list) else value

    return {name: present(value) for name, value in row.items()}


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return any((path / name).is_file() for name in SAVED_DATASET)


def read_saved_dataset(path: Path, split: str | None) -> tuple[list[str], Any]:
    """Same as `read_parquet` for a folder of `datasets.save_to_disk`.

    Raises:
        SourceError: it cannot be loaded, or does not have that split.
        MissingExtraError: datasets is not installed.
    """
    datasets = _needed("datasets", path)
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # each version, builder and file system raises its own
        raise SourceError(
            f"{path}: this folder has {' or '.join(SAVED_DATASET)}, but datasets cannot load it: "
            f"{error}"
        ) from error
    return _dataset_rows(loaded, str(path), split, datasets)


def read_hub(source: str, split: str | None, subset: str | None) -> tuple[list[str], Any]:
    """Same as `read_parquet` for a dataset on the hub, `owner/name`.

    Raises:
        SourceError: it cannot be loaded, or does not have that split.
        MissingExtraError: datasets is not installed.
    """
    datasets = _needed("datasets", source)
    try:
        loaded = datasets.load_dataset(source, name=subset)
    except Exception as error:  # the network, the hub, a builder: each raises its own
        raise SourceError(
            f"data source {source!r} is not a local file or folder"
            f"{looked_for(source, Path(source))}, and datasets cannot load it from the hub: "
            f"{_first_line(error)}"
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
                f"{source}: {f'there is no split {split!r}' if split else 'it has several splits'}"
                f". Set data.split to one of {', '.join(names)}"
            )
        loaded, source = loaded[wanted], f"{source}[{wanted}]"
    elif split is not None:
        raise SourceError(f"{source} has no splits; remove data.split: {split} from the recipe")

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
            f"{module.partition('.')[0]} is needed to read {str(source)!r} and is not installed: "
            "pip install 'qwlora[data]'"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
