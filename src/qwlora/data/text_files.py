"""Text files, JSON Lines and JSON files, and strings in Python modules.

JSON is read with Python's own `json`, so that a bad record is named by its line. `datasets` would
read NaN as null, change types to those of other lines and not know the line.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwlora.data.document import Text
from qwlora.encodings.model import repeated
from qwlora.errors import SourceError


def decode(path: Path) -> str:
    """The content of a UTF-8 file, newlines as they are.

    Raises:
        SourceError: it cannot be read, or is not UTF-8 (the line is named).
    """
    try:
        content = path.read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise SourceError(f"data source {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        start = content.rfind(b"\n", 0, error.start) + 1
        byte = f"byte {error.start - start + 1} of the line (0x{content[error.start]:02x})"
        raise SourceError(
            f"{path}:{line}: {byte} is not UTF-8 text. Convert the file to UTF-8"
        ) from error


def read_text(path: Path) -> str:
    """The text of a file, with `\\n` as newline and without a byte order mark; see `decode`."""
    return decode(path).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of each line that is not blank (`file:line`), or of each element of a list in
    a .json file (`file record N`).

    Raises:
        SourceError: it is not JSON, holds NaN or infinity, or has a key twice.
    """
    is_json = path.suffix.lower() == ".json"
    text = decode(path).removeprefix("\ufeff")
    if is_json and text.lstrip().startswith("["):
        for number, record in enumerate(_parsed(read_text(path), path, None), 1):
            yield f"{path} record {number}", record
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, path, number)


def _parsed(text: str, path: Path, line: int | None) -> Any:
    """The value of `text`, which is the whole file, or its line number `line`."""
    where = str(path) if line is None else f"{path}:{line}"
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        hint = ""
        if text.strip() in ("[", "{"):
            may = "a list of records, or " if path.suffix.lower() == ".json" else ""
            hint = f". A {path.suffix} file holds {may}one whole object a line"
        place = f"{path}:{error.lineno}" if line is None else where
        raise SourceError(
            f"{place}: this is not JSON: {error.msg.removesuffix(' at')} at character "
            f"{error.colno}{hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: this is not JSON that can be used: {error}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a value of JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := repeated(key for key, _ in pairs):
        raise ValueError(f"the key {twice[0]!r} occurs twice in one object")
    return dict(pairs)


def read_attribute(source: str) -> list[Text]:
    """Strings in an installed Python module, `python:MODULE:ATTRIBUTE`.

    Raises:
        SourceError: the module or attribute is missing, or does not hold strings.
    """
    module_name, _, attribute = source.removeprefix("python:").partition(":")
    try:
        value = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SourceError(
            f"data source {source!r} is not python:MODULE:ATTRIBUTE of an installed module: {error}"
        ) from error
    if isinstance(value, str):
        return [Text(value, source)]
    documents = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(documents, Sequence) or not all(isinstance(d, str) for d in documents):
        raise SourceError(
            f"data source {source!r} is a {type(value).__name__}; it must be a string, or a "
            "sequence or mapping of strings"
        )
    return [Text(document, f"{source}[{i}]") for i, document in enumerate(documents)]
