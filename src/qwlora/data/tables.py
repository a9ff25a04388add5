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
from pathlib import Path
from types import ModuleType
from typing import Any

from qwlora.data.file_kinds import suffix_of
from qwlora.data.text_files import decode, read_bytes
from qwlora.errors import MissingExtraError, SourceError

Rows = Iterator[tuple[str, Any]]
SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")
_LARGEST_FIELD = 2**31 - 1


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


def read_parquet(path: Path) -> tuple[list[str], Any]:
    """Column names, and a function from the columns that are wanted to (`file row N`, row).

    Raises:
        SourceError: it is not a Parquet file.
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow, parquet = _needed("pyarrow", path), _needed("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(f"{path}: this is not a Parquet file: {error}") from error
    names = list(file.schema_arrow.names)
    return names, lambda wanted: _batches(file.iter_batches(columns=list(wanted)), path, pyarrow)


def read_arrow(path: Path) -> tuple[list[str], Any]:
    """The same for an Arrow file, in the stream or the file (Feather) format.

    Raises:
        SourceError: it is neither.
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow, ipc = _needed("pyarrow", path), _needed("pyarrow.ipc", path)
    try:
        with pyarrow.memory_map(str(path)) as source:
            opened = (
                ipc.open_file(source)
                if source.read(6) == b"ARROW1"
                else ipc.open_stream(pyarrow.memory_map(str(path)))
            )
            table = opened.read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(f"{path}: this is not an Arrow file: {error}") from error
    return list(table.column_names), lambda wanted: _batches(
        table.select(list(wanted)).to_batches(), path, pyarrow
    )


def _batches(batches: Any, path: Path, pyarrow: ModuleType) -> Rows:
    number = 0
    try:
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", _without_null(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(f"{path}: the file cannot be read after row {number}: {error}") from error


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
        for number, row in enumerate(loaded.select_columns(list(wanted)), 1):
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
