"""Tables: CSV and TSV, Parquet, Arrow, folders saved by `datasets`, and the hub.

CSV is read with Python's own `csv`, so that a bad record is named by its line, and `NA` or an empty
field stays text (pandas, which `datasets` uses, makes both null and numbers of digits). `pyarrow`
reads Parquet and Arrow in place: `datasets` takes seconds to import, and `datasets` reads what only
it can. Both packages are in the extra `data`. Rows are counted from 1.
"""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from qwlora.data.text_files import decode
from qwlora.encodings.model import repeated
from qwlora.errors import SourceError, foreign_as
from qwlora.formats.user_path import looked_for
from qwlora.system.optional_packages import require

Rows = Iterator[tuple[str, Any]]
Table = tuple[list[str], Callable[[Collection[str]], Rows]]
"""Column names, and a function from the wanted columns to (place, row)."""
SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")
_LARGEST_FIELD = 2**31 - 1
_ROWS_AT_ONCE = 1000
_MOST_RATIO, _HARMLESS_BYTES = 1000, 2**27  # of what a compressed file unpacks to


def read_csv(path: Path) -> tuple[list[str], Rows]:
    """Column names, and (`file:line`, row).

    Raises:
        SourceError: it has no header, a column twice, or a row that does not fit the header.
    """
    between, delimiter = ("tab", "\t") if path.suffix.lower() == ".tsv" else ("comma", ",")
    lines = [(line, row) for line, row in _csv_rows(path, delimiter) if row]
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


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of their first line."""
    text = io.StringIO(decode(path).removeprefix("\ufeff"), newline="")
    previous, line = csv.field_size_limit(_LARGEST_FIELD), 1
    try:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        for row in reader:
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise SourceError(f"{path}:{line}: this is not CSV: {error}") from error
    finally:
        csv.field_size_limit(previous)


def read_arrow(path: Path) -> Table:
    """A Parquet file, or an Arrow file in the stream or the file (Feather) format.

    Raises:
        SourceError: it is neither.
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow, kind = require("pyarrow", "data", f"to read {str(path)!r}"), "Arrow"
    opened: Any
    if path.suffix.lower() == ".parquet":
        kind = "Parquet"
        with foreign_as(SourceError, f"{path}: this is not a Parquet file"):
            opened = importlib.import_module("pyarrow.parquet").ParquetFile(path)
            names = opened.schema_arrow.names
    else:
        ipc = importlib.import_module("pyarrow.ipc")
        with foreign_as(SourceError, f"{path}: this is not an Arrow file"):
            source = pyarrow.memory_map(str(path))
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            opened = ipc.open_file(source) if is_file else ipc.open_stream(source)
            names = opened.schema.names

    size = path.stat().st_size

    def check(unpacked: int) -> None:
        if unpacked > max(_MOST_RATIO * size, _HARMLESS_BYTES):
            raise SourceError(
                f"{path}: the file has {size:,} bytes and unpacks to more than {_MOST_RATIO} times "
                f"as many ({unpacked:,}). Save its records as .jsonl if that is intended"
            )

    def records(wanted: Collection[str]) -> Iterator[dict[str, Any]]:
        unpacked = 0
        if kind == "Parquet":
            groups = map(opened.metadata.row_group, range(opened.metadata.num_row_groups))
            check(sum(group.total_byte_size for group in groups))
            batches = opened.iter_batches(_ROWS_AT_ONCE, columns=list(wanted))
        else:
            every = map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened
            batches = (batch.select(list(wanted)) for batch in every)
        for batch in batches:
            unpacked += batch.nbytes
            check(unpacked)
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):  # as objects, rows take memory
                yield from batch.slice(start, _ROWS_AT_ONCE).to_pylist()

    return list(names), lambda wanted: _numbered(records(wanted), str(path))


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was written by `datasets.save_to_disk`."""
    return any((folder / name).is_file() for name in SAVED_DATASET)


def read_dataset(source: str, split: str | None, subset: str | None = None) -> Table:
    """A folder of `datasets.save_to_disk`, or a dataset on the hub, `owner/name`.

    Raises:
        SourceError: it cannot be loaded, or does not have that split.
        MissingExtraError: datasets is not installed.
    """
    datasets = require("datasets", "data", f"to read {source!r}")
    if Path(source).is_dir():
        what = (
            f"{source}: this folder has {' or '.join(SAVED_DATASET)}, but datasets cannot load it"
        )
        with foreign_as(SourceError, what):
            loaded = datasets.load_from_disk(source)
    else:
        what = (
            f"data source {source!r} is not a local file or folder"
            f"{looked_for(source, Path(source))}, and datasets cannot load it from the hub"
        )
        try:
            loaded = datasets.load_dataset(source, name=subset)
        except Exception as error:  # the network, the hub, a builder: each raises its own
            first = (str(error).strip() or "no message").splitlines()[0]
            raise SourceError(f"{what}: {type(error).__name__}: {first}") from error
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
    return list(loaded.column_names), lambda wanted: _numbered(
        loaded.select_columns(list(wanted)), source
    )


def _numbered(records: Iterable[dict[str, Any]], source: str) -> Rows:
    """(`source row N`, row); errors of the reader name the last row that it gave."""
    iterator, number = iter(records), 0
    while True:
        with foreign_as(SourceError, f"{source}: it cannot be read after row {number}"):
            record = next(iterator, None)
        if record is None:
            return
        number += 1
        yield f"{source} row {number}", _without_null(record)


def _without_null(value: Any) -> Any:
    """`value` without null keys of its objects: in a table, all objects of a column have the keys
    that any of them has. Null columns stay."""

    def present(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: present(v) for key, v in value.items() if v is not None}
        return [present(v) for v in value] if isinstance(value, list) else value

    return {name: present(column) for name, column in value.items()}
