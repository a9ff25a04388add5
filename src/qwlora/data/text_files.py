"""Text, JSON, JSON Lines and CSV files, read with Python's own modules.

A bad record is named by its line, and values stay what the file says. The builders of `datasets`
do neither: theirs name no line, read NaN as null, `NA` and an empty field of CSV as null, and `007`
as 7.0 (docs/log/data.md).
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwlora.errors import SourceError
from qwlora.system.strict_json import distinct_keys

Rows = Iterator[tuple[str, Any]]
"""(place, record)."""


def decode(path: Path) -> str:
    """The content of a UTF-8 file without a byte order mark, newlines as they are.

    Raises:
        SourceError: it cannot be read, or is not UTF-8 (the line is named).
    """
    try:
        content = path.read_bytes()
        return content.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise SourceError(f"data source {str(path)!r} cannot be read: {error.strerror}") from error
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
    file (`file record N`).

    Raises:
        SourceError: it is not JSON, holds NaN or infinity, or has a key twice.
    """
    text = read_text(path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        for number, record in enumerate(_parsed(text, path, None), 1):
            yield f"{path} record {number}", record
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, path, number)


def _parsed(text: str, path: Path, line: int | None) -> Any:
    """The value of `text`, which is the whole file, or its line number `line`."""
    where = str(path) if line is None else f"{path}:{line}"
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=distinct_keys)
    except json.JSONDecodeError as error:
        hint = ""
        if text.strip() in ("[", "{"):
            may = "a list of records, or " if path.suffix.lower() == ".json" else ""
            hint = f". A {path.suffix} file holds {may}one whole object a line"
        raise SourceError(
            f"{path}:{line or error.lineno}: this is not JSON: {error.msg.removesuffix(' at')} at "
            f"character {error.colno}{hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: this is not JSON that can be used: {error}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a value of JSON")


def read_csv(path: Path) -> tuple[list[str], Rows]:
    """Column names, and the rows, each with the number of its first line (`file:line`).

    Raises:
        SourceError: it is not CSV, has no header, a column twice, or a row that does not fit.
    """
    between, delimiter = ("tab", "\t") if path.suffix.lower() == ".tsv" else ("comma", ",")
    lines, line = list[tuple[int, list[str]]](), 1
    before = csv.field_size_limit(2**31 - 1)  # by default 131,072 characters
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
