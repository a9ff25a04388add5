"""Read and write encodings files.

    read_encodings(path)           an EncodingsFile, or EncodingsFileError with every problem
    write_encodings(file, path)    atomic, in the file's version or another, or ConversionError if
                                   that version cannot express it

Files are not trusted: reading takes time and memory proportional to the size, up to `LIMIT_BYTES`,
and raises only these errors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwlora.errors import EncodingsFileError, described
from qwlora.formats.aimet_encodings.convert import convert
from qwlora.formats.aimet_encodings.findings import Finding, describe, findings_of, printable
from qwlora.formats.aimet_encodings.model import EncodingsFile
from qwlora.formats.aimet_encodings.version_1 import Document061, Document100, SectionsDocument
from qwlora.formats.aimet_encodings.version_2 import Document2
from qwlora.system.atomic import write_text
from qwlora.system.strict_json import distinct_keys

LIMIT_BYTES = 2**31
DOCUMENTS: dict[str, type[SectionsDocument | Document2]] = {
    "0.6.1": Document061,
    "1.0.0": Document100,
    "2.0.0": Document2,
    "2.1.0": Document2,
}


def read_encodings(path: Path | str) -> EncodingsFile:
    """The encodings file at `path`.

    Raises:
        EncodingsFileError: it does not exist, is not JSON, or violates the rules of its version;
            `problems` has every finding.
    """
    file, findings = parse(load_json(path))
    if file is None:
        raise EncodingsFileError(str(path), [str(finding) for finding in findings])
    return file


def write_encodings(file: EncodingsFile, path: Path | str, version: str | None = None) -> None:
    """Write `file`; on an error the path keeps its old content.

    Args:
        version: one of `VERSIONS`; default: the file's.

    Raises:
        ConversionError: the version cannot express the content, or needs more; see `convert`.
        EncodingsFileError: a field of the file is no JSON, or the path cannot be written.
    """
    text = to_text(file if version is None else convert(file, version))
    try:
        write_text(Path(path), text)
    except (OSError, ValueError) as error:
        raise EncodingsFileError(str(path), [f"cannot be written: {described(error)}"]) from error


def to_text(file: EncodingsFile) -> str:
    """The text that `write_encodings` writes: JSON with one encoding per line."""
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
    """The JSON value that `write_encodings` writes; same errors."""
    if file.version not in DOCUMENTS:
        problem = f"version {printable(file.version)!r} is not one of {', '.join(DOCUMENTS)}"
        raise EncodingsFileError("encodings", [problem])
    convert(file, file.version)  # refuses what the version cannot express; arrays are shared
    entries = DOCUMENTS[file.version].sections_of(file)
    document: dict[str, Any] = {"version": file.version}
    if file.producer is not None:
        document["producer"] = dict(file.producer)
    settings: dict[str, Any] = {}
    if file.excluded_layers is not None:
        settings["excluded_layers"] = list(file.excluded_layers)
    if file.quantizer_args is not None:
        settings["quantizer_args"] = dict(file.quantizer_args)
    # entries are valid by construction; the other fields are checked without them
    empty = {section: type(values)() for section, values in entries.items()}
    _, findings = parse(document | empty | settings)
    if findings:
        raise EncodingsFileError("encodings", [str(finding) for finding in findings])
    return document | entries | settings


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


def load_json(path: Path | str, limit_bytes: int = LIMIT_BYTES) -> Any:
    """The JSON value in a file.

    Raises:
        EncodingsFileError: the file does not exist, is larger than the limit, or is not JSON; a key
            is repeated in one object.
    """
    try:
        with open(path, "rb") as stream:
            content = stream.read(limit_bytes + 1)
        problem = f"is larger than {limit_bytes} bytes"
        if len(content) <= limit_bytes:
            return json.loads(content.decode(), object_pairs_hook=distinct_keys)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text: {error.reason} at byte {error.start}"
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
    except RecursionError:
        problem = "is nested too deeply for an encodings file"
    except ValueError as error:  # a repeated key, thousands of digits, or a null byte in the path
        problem = str(error)
    raise EncodingsFileError(str(path), [problem])
