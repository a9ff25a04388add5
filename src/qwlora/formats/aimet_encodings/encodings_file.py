"""Read, write and convert encodings files.

Files are not trusted: reading takes time and memory proportional to the size, and raises only
EncodingsFileError.

A conversion neither loses nor invents information. Versions 0.6.1 and 1.0.0 have a section for
parameters but store no axes; 2.0.0 and 2.1.0 store axes but have no sections. The missing part is
known only to the model, so files are converted only within a pair:

    0.6.1 to 1.0.0, 2.1.0 to 2.0.0    nothing is lost
    1.0.0 to 0.6.1    lost: block sizes (blocks become channels), LPBQ, and whether one scale in a
                      list is a channel's or the tensor's
    2.0.0 to 2.1.0    lost: LPBQ without one scale for each channel of a single axis
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwlora.errors import ConversionError, EncodingsFileError, described, listed
from qwlora.formats.aimet_encodings.documents import (
    Document2,
    Section061,
    Section100,
    SectionsDocument,
    describe,
    is_by_module,
    printable,
    problem_line,
    problem_lines,
    sections_of,
    without_modules,
)
from qwlora.formats.aimet_encodings.model import (
    VERSIONS,
    EncodingsFile,
    Entry,
    FloatEncoding,
    IntegerEncoding,
    LpbqEncoding,
    has_axes,
)
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
    # Refuses content that the version cannot express. It copies no array.
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


def convert(file: EncodingsFile, version: str, lossy: bool = False) -> EncodingsFile:
    """`file` in another version.

    Args:
        version: one of `VERSIONS`.
        lossy: drop what the version cannot express, including whole encodings, instead of raising.

    Raises:
        ConversionError: the version is unknown or in the other pair, or information would be lost
            and `lossy` is False.
    """
    if version not in VERSIONS:
        problem = f"version {printable(str(version))!r} is not one of {', '.join(VERSIONS)}"
        raise ConversionError(problem)
    what = f"encodings {file.version} -> {version}"
    if has_axes(version) != (file.parameters is None):
        needed = "the axes of scales" if has_axes(version) else "which encodings are parameters"
        raise ConversionError(
            f"{what}: the file does not store {needed}. Export the model again in version {version}"
        )
    kept: list[Entry] = []
    names_of = defaultdict[str, list[str]](list)  # by what they lose
    for entry in file.encodings:
        stored = _stored(entry, version)
        for part in _lost(entry, stored):
            names_of[part].append(printable(entry.name))
        kept += [] if stored is None else [stored]
    if names_of and not lossy:
        lost = [f"{listed(names, 3)}: {part}" for part, names in names_of.items()]
        raise ConversionError(what, lost)
    parameters = file.parameters and file.parameters & {entry.name for entry in kept}
    return file.replace(version=version, encodings=tuple(kept), parameters=parameters)


def _stored(entry: Entry, version: str) -> Entry | None:
    """The part of an encoding that a version can store; None if it can store nothing."""
    nested, is_oldest = has_axes(version), version == "0.6.1"
    match entry:
        case FloatEncoding():
            return entry if nested == (entry.format is not None) else None
        case LpbqEncoding() if nested:
            axis, scales = entry.channel_axis, entry.channel_scale.size
            is_per_channel = axis is not None and scales == entry.block_scale.shape[axis]
            if entry.axis is None or (version == "2.1.0" and not is_per_channel):
                return None
            return entry.replace(decompressed_bitwidth=None)
        case LpbqEncoding():
            is_flat = entry.axis is None and entry.decompressed_bitwidth is not None
            return entry if is_flat and not is_oldest else None
        case IntegerEncoding() if nested:
            has_axis = entry.axis is not None or entry.granularity == "tensor"
            # 2.x has no field for it: a reader sees only whether every zero point is at the center.
            return entry.replace(symmetric=entry.is_centered) if has_axis else None
    is_tensor = entry.granularity == "tensor" or (is_oldest and entry.scale.size == 1)
    scale, offset = (v.reshape(() if is_tensor else -1) for v in (entry.scale, entry.offset))
    size = None if is_oldest else entry.block_size
    return entry.replace(scale=scale, offset=offset, signed=None, axis=None, block_size=size)


def _lost(entry: Entry, stored: Entry | None) -> list[str]:
    if stored is None:
        kind = {IntegerEncoding: "integers", LpbqEncoding: "LPBQ", FloatEncoding: "floats"}
        name = f" ({entry.format})" if isinstance(entry, FloatEncoding) and entry.format else ""
        return [f"the whole encoding, {kind[type(entry)]} of {entry.bitwidth} bits{name}"]
    if entry.granularity != stored.granularity:
        return [f"granularity {entry.granularity}"]
    keys = [field.name for field in fields(entry) if field.name not in entry.arrays]
    values = {key: getattr(entry, key) for key in keys}
    return [f"{k} {v}" for k, v in values.items() if v not in (None, getattr(stored, k))]
