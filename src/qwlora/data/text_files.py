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
from qwlora.data.file_kinds import suffix_of
from qwlora.encodings.model import repeated
from qwlora.errors import SourceError


def read_text(path: Path) -> str:
    """The text of a file, with `\\n` as newline and without a byte order mark.

    Raises:
        SourceError: it cannot be read, or is not UTF-8.
    """
    return (
        decode(read_bytes(path), path)
        .removeprefix("\ufeff")
        .replace("\r\n", "\n")
        .replace("\r", "\n")
    )


def read_bytes(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"data source {str(path)!r} cannot be read: {error.strerror}") from error


def decode(content: bytes, path: Path) -> str:
    """Decode UTF-8.

    Raises:
        SourceError: it is not UTF-8; the line is named.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        start = content.rfind(b"\n", 0, error.start) + 1
        byte = f"byte {error.start - start + 1} of the line (0x{content[error.start]:02x})"
        raise SourceError(
            f"{path}:{line}: {byte} is not UTF-8 text. Convert the file to UTF-8"
        ) from error


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(`file:line`, value) of each line that is not blank.

    Raises:
        SourceError: a line is not JSON, holds NaN or infinity, or has a key twice.
    """
    for number, line in enumerate(
        decode(read_bytes(path), path).removeprefix("\ufeff").split("\n"), 1
    ):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield (
                where,
                json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=_distinct),
            )
        except json.JSONDecodeError as error:
            may = "a list of records, or " if suffix_of(path) == ".json" else ""
            hint = (
                f". A {path.suffix} file holds {may}one whole object a line"
                if line.strip() in ("[", "{")
                else ""
            )
            raise SourceError(
                f"{where}: this is not JSON: {error.msg.removesuffix(' at')} at character "
                f"{error.colno}{hint}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{where}: this is not JSON that can be used: {error}") from error


def read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """(`file record N`, value) of each element of a list; otherwise as `read_json_lines`.

    Raises:
        SourceError: it is not JSON; see `read_json_lines`.
    """
    text = read_text(path)
    if not text.lstrip().startswith("["):
        yield from read_json_lines(path)
        return
    try:
        records = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise SourceError(
            f"{path}:{error.lineno}: this is not JSON: {error.msg.removesuffix(' at')} at "
            f"character {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: this is not JSON that can be used: {error}") from error
    for number, record in enumerate(records, 1):
        yield f"{path} record {number}", record


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a value of JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = repeated(key for key, _ in pairs)
        raise ValueError(f"the key {twice[0]!r} occurs twice in one object")
    return found


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
    documents = (
        list(value.values())
        if isinstance(value, Mapping)
        else list(value)
        if isinstance(value, Sequence)
        else None
    )
    if documents is None or not all(isinstance(d, str) for d in documents):
        raise SourceError(
            f"data source {source!r} is a {type(value).__name__}; it must be a string, or a "
            "sequence or mapping of strings"
        )
    return [Text(document, f"{source}[{i}]") for i, document in enumerate(documents)]
