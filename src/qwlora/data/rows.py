"""Files, tables and datasets to rows: where each is, and its content.

Python's own modules read text, JSON, JSON Lines and CSV, `pyarrow` Parquet and Arrow files, and
`datasets` what only it can. The last two are in the extra `data`.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from qwlora.errors import SourceError, foreign_as
from qwlora.formats.model_source import looked_for
from qwlora.system.optional_packages import require
from qwlora.system.regular_files import check_readable, is_inside
from qwlora.system.strict_json import distinct_keys

Rows = Iterator[tuple[str, Any]]
"""(place, record). Rows of tables are counted from 1."""
Table = tuple[list[str], Callable[[Collection[str]], Rows]]
"""Column names, and a function from the wanted columns to the rows, which may have more."""
SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")
_ROWS_AT_ONCE = 1000


def decode(path: Path) -> str:
    """The content of a UTF-8 file without a byte order mark, newlines as they are. If it has other
    bytes, the SourceError names their line."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise SourceError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise SourceError(
            f"{path}:{line}: byte {column} of the line (0x{content[error.start]:02x}) is not UTF-8 "
            "text. Convert the file to UTF-8"
        ) from error


def read_text(path: Path) -> str:
    """The text of a file, with `\\n` as newline; see `decode`."""
    return decode(path).replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> Rows:
    """The value of each line that is not blank (`file:line`), or each element of a list in a .json
    file (`file record N`). NaN, infinity and a key that occurs twice are refused."""
    # `datasets` 5.2 names no line of a bad record and reads NaN as null (docs/log/data.md).
    text = read_text(path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        for number, record in enumerate(_parsed(text, path, None), 1):
            yield f"{path} record {number}", record
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, path, number)


def _parsed(text: str, path: Path, line: int | None) -> Any:
    where, part = (path, "this") if line is None else (f"{path}:{line}", "this line")
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=distinct_keys)
    except json.JSONDecodeError as error:
        hint = ""
        if text.strip() in ("[", "{"):
            may = "a list of records, or " if path.suffix.lower() == ".json" else ""
            hint = f". A {path.suffix} file holds {may}one whole object a line"
        raise SourceError(
            f"{path}:{line or error.lineno}: {part} is not JSON: {error.msg.removesuffix(' at')} "
            f"at character {error.colno}{hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: {part} is not JSON that can be used: {error}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a value of JSON")


def read_csv(path: Path) -> tuple[list[str], Rows]:
    """Column names, and the rows, each with the number of its first line (`file:line`)."""
    # `datasets` 5.2 reads `NA` and empty fields as null, and `007` as 7.0 (docs/log/data.md).
    between, delimiter = ("tab", "\t") if path.suffix.lower() == ".tsv" else ("comma", ",")
    lines, line = list[tuple[int, list[str]]](), 1
    # By default, Python refuses fields of more than 131,072 characters, as long texts have them.
    before = csv.field_size_limit(2**31 - 1)
    # Without `newline`, line breaks in quoted fields would change. Unless it is strict, Python
    # reads a field with a stray quote as something else.
    try:
        reader = csv.reader(io.StringIO(decode(path), newline=""), delimiter=delimiter, strict=True)
        for row in reader:
            lines += [(line, row)] if row else []
            line = reader.line_num + 1
    except csv.Error as error:
        raise SourceError(f"{path}:{line}: this is not CSV: {error}") from error
    finally:
        csv.field_size_limit(before)
    if not lines:
        raise SourceError(f"{path}: the file is empty. Its first line must name the columns")
    header = lines[0][1]
    if twice := [name for name, count in Counter(header).items() if count > 1]:
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


def read_arrow(path: Path) -> Table:
    """A Parquet file, or an Arrow file in the stream or the file (Feather) format."""
    # `datasets` would copy the file to its cache, and its import takes 1.3 s, pyarrow's 0.2 s.
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
            # The file format begins with this mark, the stream format with its first message.
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            opened = ipc.open_file(source) if is_file else ipc.open_stream(source)
            schema = opened.schema

    def records(wanted: Collection[str]) -> Iterator[dict[str, Any]]:
        if is_parquet:
            batches = opened.iter_batches(_ROWS_AT_ONCE, columns=list(wanted))
        else:
            every = map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened
            batches = (batch.select(list(wanted)) for batch in every)
        for batch in batches:
            # Rows take more memory as Python's objects, and a batch of an Arrow file has any size.
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield from batch.slice(start, _ROWS_AT_ONCE).to_pylist()

    return list(schema.names), lambda wanted: _numbered(
        records(_with_texts(wanted, schema)), str(path)
    )


def read_dataset(source: str, split: str | None, subset: str | None = None) -> Table:
    """A folder of `datasets.save_to_disk`, or a dataset on the hub, `owner/name`."""
    datasets = require("datasets", "data", f"to read {source!r}")
    is_saved = Path(source).is_dir()
    problem = (
        f"{source}: this folder has {' or '.join(SAVED_DATASET)}, but datasets cannot load it"
        if is_saved
        else f"data source {source!r} is not a local file or folder"
        f"{looked_for(source, Path(source))}, and datasets cannot load it from the hub"
    )
    with foreign_as(SourceError, problem):
        # A stranger's folder may list any file of the machine, or a pipe.
        for state in Path(source).rglob("state.json") if is_saved else ():
            check_readable(state.parent)
            files = [entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
            if outside := [file for file in files if not is_inside(state.parent, file)]:
                raise SourceError(f"{str(state)!r} lists {outside[0]!r}, not a file of its folder")
        loaded = (
            datasets.load_from_disk(source)
            if is_saved
            else datasets.load_dataset(source, name=subset)
        )
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
        raise SourceError(f"{source} has no splits, but data.split is {split!r}: set it to null")
    schema = loaded.features.arrow_schema
    return list(loaded.column_names), lambda wanted: _numbered(
        loaded.select_columns(_with_texts(wanted, schema)), source
    )


def _with_texts(wanted: Collection[str], schema: Any) -> list[str]:
    """The wanted columns and those of strings, which are a caution if they are not used."""
    texts = [column.name for column in schema if str(column.type) in ("string", "large_string")]
    return [*dict.fromkeys((*wanted, *texts))]


def _numbered(records: Iterable[dict[str, Any]], source: str) -> Rows:
    iterator, number = iter(records), 0
    # A damaged file fails somewhere in its middle, as it is read in batches.
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
    # In a table, all objects of a column have the keys that any of them has, as null.
    if isinstance(value, dict):
        return {key: _without_null(v) for key, v in value.items() if v is not None}
    return [_without_null(v) for v in value] if isinstance(value, list) else value
