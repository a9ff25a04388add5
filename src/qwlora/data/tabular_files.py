"""Tables: Parquet and Arrow files, folders saved by `datasets`, and datasets on the hub.

`pyarrow` reads files in place and in batches, so that one of kilobytes that unpacks to gigabytes is
refused before it fills memory. `datasets`, which takes seconds to import and copies files to its
cache, reads what only it can. Both packages are in the extra `data`. Rows are counted from 1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from qwlora.data.text_files import Rows
from qwlora.errors import SourceError, foreign_as
from qwlora.formats.user_path import looked_for
from qwlora.system.optional_packages import require

Table = tuple[list[str], Callable[[Collection[str]], Rows]]
"""Column names, and a function from the wanted columns to the rows."""
SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")
_ROWS_AT_ONCE = 1000
_MOST_RATIO, _HARMLESS_BYTES = 1000, 2**27  # of what a compressed file unpacks to


def read_arrow(path: Path) -> Table:
    """A Parquet file, or an Arrow file in the stream or the file (Feather) format.

    Raises:
        SourceError: it is neither.
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow = require("pyarrow", "data", f"to read {str(path)!r}")
    is_parquet = path.suffix.lower() == ".parquet"
    kind = "a Parquet" if is_parquet else "an Arrow"
    with foreign_as(SourceError, f"{path}: this is not {kind} file"):
        if is_parquet:
            opened: Any = importlib.import_module("pyarrow.parquet").ParquetFile(path)
            schema = opened.schema_arrow
        else:
            ipc = importlib.import_module("pyarrow.ipc")
            source = pyarrow.memory_map(str(path))
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            opened = ipc.open_file(source) if is_file else ipc.open_stream(source)
            schema = opened.schema

    def check(unpacked: int) -> None:
        size = path.stat().st_size
        if unpacked > max(_MOST_RATIO * size, _HARMLESS_BYTES):
            raise SourceError(
                f"{path}: the file has {size:,} bytes and unpacks to more than {_MOST_RATIO} times "
                f"as many ({unpacked:,}). Save its records as .jsonl if that is intended"
            )

    def records(wanted: Collection[str]) -> Iterator[dict[str, Any]]:
        if is_parquet:
            groups = map(opened.metadata.row_group, range(opened.metadata.num_row_groups))
            check(sum(group.total_byte_size for group in groups))
            batches = opened.iter_batches(_ROWS_AT_ONCE, columns=list(wanted))
        else:
            every = map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened
            batches = (batch.select(list(wanted)) for batch in every)
        unpacked = 0
        for batch in batches:
            unpacked += batch.nbytes
            check(unpacked)
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):  # as objects, rows take memory
                yield from batch.slice(start, _ROWS_AT_ONCE).to_pylist()

    return list(schema.names), lambda wanted: _numbered(records(wanted), str(path))


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
        with foreign_as(SourceError, what):
            loaded = datasets.load_dataset(source, name=subset)
    if isinstance(loaded, datasets.DatasetDict):
        names = list(loaded)
        wanted = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
        if wanted not in names:
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
        yield (
            f"{source} row {number}",
            {name: _without_null(column) for name, column in record.items()},
        )


def _without_null(value: Any) -> Any:
    """`value` without null keys of its objects: in a table, all objects of a column have the keys
    that any of them has."""
    if isinstance(value, dict):
        return {key: _without_null(v) for key, v in value.items() if v is not None}
    return [_without_null(v) for v in value] if isinstance(value, list) else value
