"""Read and write encodings files.

    read(path)           an EncodingsFile, or EncodingsFileError with every problem
    write(file, path)    atomic, in the file's version, or ConversionError if that cannot express it

Files are not trusted: reading takes time and memory proportional to the size, up to `LIMIT_BYTES`,
and raises only these errors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwlora.atomic import write_text
from qwlora.encodings.convert import convert
from qwlora.encodings.document import Document
from qwlora.encodings.findings import Finding, describe, findings_of, printable
from qwlora.encodings.model import VERSIONS, EncodingsFile, repeated
from qwlora.encodings.version_0_6_1 import Document061
from qwlora.encodings.version_1_0_0 import Document100
from qwlora.encodings.version_2 import Document200, Document210
from qwlora.errors import EncodingsFileError

LIMIT_BYTES = 2**31
DOCUMENTS: dict[str, type[Document]] = dict(
    zip(VERSIONS, (Document061, Document100, Document200, Document210), strict=True)
)


def read(path: Path | str) -> EncodingsFile:
    """The encodings file at `path`.

    Raises:
        EncodingsFileError: it does not exist, is not JSON, or violates the rules of its version;
            `problems` has every finding.
    """
    file, findings = parse(load_json(path))
    if file is None:
        raise EncodingsFileError(str(path), [str(finding) for finding in findings])
    return file


def parse(document: Any) -> tuple[EncodingsFile | None, list[Finding]]:
    """The file that a JSON value describes, or None and every problem."""
    if not isinstance(document, dict):
        return None, [Finding("error", "file", "", f"is {describe(document)}; an object is needed")]
    version = document.get("version")
    if not isinstance(version, str) or version not in DOCUMENTS:
        problem = f"is {describe(version)}; one of {', '.join(DOCUMENTS)} is needed"
        problem = problem if "version" in document else "is missing"
        return None, [Finding("error", "file", "version", problem)]
    try:
        return DOCUMENTS[version].model_validate(document).content(), []
    except ValidationError as error:
        return None, list(findings_of(error, document))
    except EncodingsFileError as error:
        return None, [Finding("error", "file", "", problem) for problem in error.problems]


def write(file: EncodingsFile, path: Path | str) -> None:
    """Write `file` in its own version; on an error the path keeps its old content.

    Raises:
        ConversionError: the version cannot express the content, or needs more.
        EncodingsFileError: a field of the file is no JSON, or the path cannot be written.
    """
    text = to_text(file)
    try:
        write_text(Path(path), text)
    except (OSError, ValueError) as error:
        raise EncodingsFileError(str(path), [f"cannot be written: {_reason(error)}"]) from error


def to_text(file: EncodingsFile) -> str:
    """The text that `write` writes: JSON with one encoding per line.

    Raises:
        ConversionError, EncodingsFileError: as `write`.
    """
    fields = (f" {json.dumps(key)}: {_lines(value)}" for key, value in to_document(file).items())
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _lines(value: Any) -> str:
    """JSON; a list of objects, or an object of lists, with one item per line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n  " + ",\n  ".join(json.dumps(entry) for entry in value) + "\n ]"
    if isinstance(value, dict) and any(isinstance(entry, list) for entry in value.values()):
        entries = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
        return "{\n  " + ",\n  ".join(entries) + "\n }"
    return json.dumps(value)


def to_document(file: EncodingsFile) -> dict[str, Any]:
    """The JSON value that `write` writes.

    Raises:
        ConversionError, EncodingsFileError: as `write`.
    """
    if file.version not in DOCUMENTS:
        problem = f"version {printable(file.version)!r} is not one of {', '.join(DOCUMENTS)}"
        raise EncodingsFileError("encodings", [problem])
    convert(file, file.version)  # refuses what the version cannot express; arrays are shared
    document: dict[str, Any] = {"version": file.version}
    if file.producer is not None:
        document["producer"] = dict(file.producer)
    entries = DOCUMENTS[file.version].sections_of(file)
    fields: dict[str, Any] = {}
    if file.excluded_layers is not None:
        fields["excluded_layers"] = list(file.excluded_layers)
    if file.quantizer_args is not None:
        fields["quantizer_args"] = dict(file.quantizer_args)
    _, findings = parse(
        document | dict.fromkeys(entries, type(next(iter(entries.values())))()) | fields
    )
    if findings:
        raise EncodingsFileError("encodings", [str(finding) for finding in findings])
    return document | entries | fields


def load_json(path: Path | str, limit_bytes: int = LIMIT_BYTES) -> Any:
    """The JSON value in a file.

    Raises:
        EncodingsFileError: the file does not exist, is larger than the limit, or is not JSON; a key
            is repeated in one object.
    """
    try:
        with open(path, "rb") as stream:
            content = stream.read(limit_bytes + 1)
    except (OSError, ValueError) as error:
        raise EncodingsFileError(str(path), [f"cannot be read: {_reason(error)}"]) from error
    if len(content) > limit_bytes:
        raise EncodingsFileError(str(path), [f"is larger than {limit_bytes} bytes"])
    try:
        return json.loads(content.decode(), object_pairs_hook=_distinct)
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text: {error.reason} at byte {error.start}"
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
    except _RepeatedKeyError as error:
        problem = str(error)
    except RecursionError:
        problem = "is nested too deeply for an encodings file"
    except ValueError:
        problem = "contains an integer of thousands of digits"
    raise EncodingsFileError(str(path), [problem])


class _RepeatedKeyError(ValueError):
    pass


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        key = printable(repeated(key for key, _ in pairs)[0])
        raise _RepeatedKeyError(f"has the key {key!r} twice in one object")
    return values


def _reason(error: OSError | ValueError) -> str:
    """The operating system's message without the path, or that of a path that it cannot take."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
