"""Read and write encodings files.

Files are not trusted: reading takes time and memory proportional to the size, and raises only
EncodingsFileError.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwlora.errors import EncodingsFileError, described
from qwlora.formats.aimet_encodings.convert import convert
from qwlora.formats.aimet_encodings.documents import (
    Document2,
    Section061,
    Section100,
    SectionsDocument,
    describe,
    is_by_module,
    problem_line,
    problem_lines,
    sections_of,
    without_modules,
)
from qwlora.formats.aimet_encodings.model import EncodingsFile
from qwlora.system.atomic import write_text
from qwlora.system.output_path import as_directory_errors
from qwlora.system.regular_files import check_readable
from qwlora.system.strict_json import distinct_keys

DOCUMENTS: dict[str, type[SectionsDocument[Any] | Document2]] = {
    "0.6.1": SectionsDocument[Section061],
    "1.0.0": SectionsDocument[Section100],
    "2.0.0": Document2,
    "2.1.0": Document2,
}


def read_encodings(path: Path | str) -> EncodingsFile:
    """The encodings file at `path`.

    Raises:
        EncodingsFileError: it does not exist, is not JSON, repeats a key, or violates the rules of
            its version; `problems` has every problem.
    """
    content = b""
    try:
        check_readable(Path(path))
        content = Path(path).read_bytes()
        document = json.loads(content, object_pairs_hook=distinct_keys)
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read: {described(error)}"
        # torch.save writes a zip file (PK), pickle 0x80; safetensors has the length of its header,
        # then JSON.
        if content.startswith((b"PK\3\4", b"\x80")) or content[8:10] == b'{"':
            problem = (
                "is a pickle, a file of torch.save or safetensors, not JSON. Write the encodings "
                "with sim.onnx.export, sim.save_encodings_to_json or sim.export; pickles are not "
                "opened, because they can run code"
            )
        raise EncodingsFileError(str(path), [problem]) from error
    file, problems = parse(document)
    if file is None:
        raise EncodingsFileError(str(path), problems)
    return file


def write_encodings(file: EncodingsFile, path: Path | str, version: str | None = None) -> None:
    """Write `file`; on an error the path keeps its old content.

    Args:
        version: one of `VERSIONS`; default: the file's.

    Raises:
        ConversionError: the version cannot express the content; see `convert`.
        EncodingsFileError: a field of the file is not JSON.
        DirectoryError, OSError: the disk is full, or the path cannot be written.
    """
    text = to_text(file if version is None else convert(file, version))
    with as_directory_errors(Path(path)):
        write_text(Path(path), text)


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
    # Refuses what the version cannot express. It copies no array.
    convert(file, file.version)
    entries = sections_of(file)
    excluded, settings = file.excluded_layers, file.quantizer_args
    values = {
        "version": file.version,
        "producer": file.producer and dict(file.producer),
        **entries,
        "excluded_layers": excluded if excluded is None else list(excluded),
        "quantizer_args": settings if settings is None else dict(settings),
    }
    document = {key: value for key, value in values.items() if value is not None}
    # Entries are valid by construction; the other fields are checked without them.
    _, problems = parse(document | {section: type(part)() for section, part in entries.items()})
    if problems:
        raise EncodingsFileError("encodings", problems)
    return document


def parse(document: Any) -> tuple[EncodingsFile | None, list[str]]:
    """The file that a JSON value describes, or None and every problem."""
    if not isinstance(document, dict):
        return None, [f"file: is {describe(document)}; an object is needed"]
    if is_by_module(document):
        try:
            document = without_modules(document)
        except EncodingsFileError as error:
            return None, [problem_line(error.source, "", problem) for problem in error.problems]
    version = document.get("version")
    if not isinstance(version, str) or version not in DOCUMENTS:
        problem = f"is {describe(version)}; one of {', '.join(DOCUMENTS)} is needed"
        problem = problem if "version" in document else "is missing"
        return None, [f"file, version: {problem}"]
    try:
        return DOCUMENTS[version].model_validate(document).content(), []
    except ValidationError as error:
        return None, list(problem_lines(error, document))
    except EncodingsFileError as error:
        return None, [f"file: {problem}" for problem in error.problems]
