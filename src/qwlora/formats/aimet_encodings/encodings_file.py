"""Read, write and validate encodings files.

Files are not trusted: reading takes time and memory proportional to the size, and raises only
EncodingsFileError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwlora.errors import EncodingsFileError, described
from qwlora.formats.aimet_encodings.convert import convert
from qwlora.formats.aimet_encodings.documents import (
    Document2,
    Finding,
    Section061,
    Section100,
    SectionsDocument,
    describe,
    findings_of,
    is_by_module,
    shared_lines,
    without_modules,
)
from qwlora.formats.aimet_encodings.model import EncodingsFile, Entry, IntegerEncoding, LpbqEncoding
from qwlora.formats.aimet_encodings.onnx_tensors import Graph, OnnxTensor, read_graph
from qwlora.system.atomic import write_text
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
        EncodingsFileError: a field of the file is not JSON, or the path cannot be written.
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
    convert(file, file.version)  # refuses what the version cannot express; arrays are shared
    entries = DOCUMENTS[file.version].sections_of(file)
    excluded, settings = file.excluded_layers, file.quantizer_args
    values = {
        "version": file.version,
        "producer": file.producer and dict(file.producer),
        **entries,
        "excluded_layers": excluded if excluded is None else list(excluded),
        "quantizer_args": settings if settings is None else dict(settings),
    }
    document = {key: value for key, value in values.items() if value is not None}
    # entries are valid by construction; the other fields are checked without them
    _, findings = parse(document | {section: type(part)() for section, part in entries.items()})
    if findings:
        raise EncodingsFileError("encodings", [str(finding) for finding in findings])
    return document


def parse(document: Any) -> tuple[EncodingsFile | None, list[Finding]]:
    """The file that a JSON value describes, or None and every problem."""
    if not isinstance(document, dict):
        return None, [Finding("error", "file", "", f"is {describe(document)}; an object is needed")]
    if is_by_module(document):
        try:
            document = without_modules(document)
        except EncodingsFileError as error:
            return None, [Finding("error", error.source, "", problem) for problem in error.problems]
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


def load_json(path: Path | str) -> Any:
    """The JSON value in a file.

    Raises:
        EncodingsFileError: the file cannot be read or is not JSON, or an object repeats a key.
    """
    content = b""
    try:
        check_readable(Path(path))
        content = Path(path).read_bytes()
        return json.loads(content, object_pairs_hook=distinct_keys)
    except (OSError, ValueError, RecursionError) as error:
        if content.startswith((b"PK\3\4", b"\x80")) or content[8:10] == b'{"':
            problem = (
                "is a pickle, a file of torch.save or safetensors, not JSON. Write the encodings "
                "with sim.onnx.export, sim.save_encodings_to_json or sim.export; pickles are not "
                "opened, because they can run code"
            )
            raise EncodingsFileError(str(path), [problem]) from error
        raise EncodingsFileError(str(path), [f"cannot be read: {described(error)}"]) from error


def validate(
    file: EncodingsFile | Path | str, onnx_path: Path | str | None = None
) -> list[Finding]:
    """Findings, errors first.

    Args:
        file: a path, or a value; whether its version can hold a value is known when it is written.
        onnx_path: the model; names, shapes and axes are compared with its graph.

    Raises:
        EncodingsFileError: the file does not exist or is not JSON, or the model is not ONNX.
            Problems inside the JSON are findings.
        MissingExtraError: a model is given, and onnx is not installed.
    """
    parsed, findings = (file, []) if isinstance(file, EncodingsFile) else parse(load_json(file))
    graph = read_graph(onnx_path) if onnx_path is not None else None
    if parsed is not None:
        for encoding in parsed.encodings:
            findings += _odd_values(encoding)
        findings += _against_graph(parsed, graph) if graph is not None else ()
    return sorted(findings, key=lambda finding: finding.severity == "warning")


def _odd_values(encoding: Entry) -> Iterator[Finding]:
    if not isinstance(encoding, IntegerEncoding):
        return
    name, offset, lowest = encoding.name, encoding.offset, -(2**encoding.bitwidth - 1)
    outside = (offset < lowest) | (offset > 0)
    if outside.any():
        problem = (
            f"is {offset[outside][0]}, outside [{lowest}, 0], in {int(outside.sum())} of "
            f"{offset.size} grids: zero is not on the grid"
        )
        yield Finding("error", name, "offset", problem)
    elif encoding.symmetric and not encoding.is_centered:
        problem = (
            f"is {offset.reshape(-1)[0]}, but the encoding is called symmetric, which needs "
            f"{encoding.center}"
        )
        yield Finding("warning", name, "offset", problem)


def _against_graph(file: EncodingsFile, graph: Graph) -> Iterator[Finding]:
    for encoding in file.encodings:
        name, tensor = encoding.name, graph.get(encoding.name)
        if tensor is None:
            yield Finding("error", name, "name", "is not the name of a tensor in the graph")
            continue
        if file.parameters is not None and (name in file.parameters) != tensor.parameter:
            kinds = ("an activation", "a parameter")
            said, is_kind = kinds[not tensor.parameter], kinds[tensor.parameter]
            message = f"says {said}, but it is {is_kind} of the graph"
            yield Finding("error", name, "section", message)
        if tensor.shape is not None and (problem := _shape_problem(encoding, tensor, tensor.shape)):
            yield Finding("error", name, "scale", problem)
    encoded = file.by_name.keys()
    for name, tensor in graph.items():
        encoded_later = tensor.moved_to and encoded >= set(tensor.moved_to)
        if not tensor.needs_encoding or name in encoded or encoded_later:
            continue
        kind = f"computed by {tensor.computed_by}" if tensor.computed_by else "a graph input"
        kind = "a parameter of the graph" if tensor.parameter else kind
        yield Finding("warning", name, "", f"is {kind} without an encoding, and stays float")


def _shape_problem(entry: Entry, tensor: OnnxTensor, shape: tuple[int, ...]) -> str | None:
    """Why the scales do not fit a tensor of `shape`; None if they do, or if no op says its axes."""
    scale = entry.block_scale if isinstance(entry, LpbqEncoding) else entry.scale
    size = entry.block_size
    implied = tensor.channel_axis if size is None else tensor.block_axis
    axis = implied if entry.axis is None else entry.axis
    if scale is None or not scale.ndim or axis is None:
        return None
    if not -len(shape) <= axis < len(shape):
        return f"axis is {axis}, outside a tensor of shape {list(shape)}"
    axis %= len(shape)
    nested = size is not None and entry.axis is not None
    blocks = [n // size if size and i == axis else n for i, n in enumerate(shape)]
    if size is None:
        needed = [shape[axis]]
    elif nested:
        needed = blocks
    else:  # a flat list: blocks of each channel, or of each index of the other axes
        channel = tensor.channel_axis
        needed = [math.prod(n for i, n in enumerate(blocks) if i == axis or channel in (None, i))]
    # nested scales may be shared along axes other than that of the blocks
    fits = scale.ndim == len(needed) and all(
        have == need or (nested and have == 1 and i != axis)
        for i, (have, need) in enumerate(zip(scale.shape, needed, strict=True))
    )
    if fits and not (size and shape[axis] % size):
        return None
    what = "" if size is None else f" in blocks of {size}"
    return f"has shape {list(scale.shape)}, but axis {axis} of {list(shape)}{what} needs {needed}"


def finding_lines(findings: list[Finding]) -> list[str]:
    """One line per finding; equal warnings about many tensors share a line."""
    warnings = [
        (f"{f.where}, {f.field}" if f.field else f.where, f.message)
        for f in findings
        if f.severity == "warning"
    ]
    return [
        *(f"error: {finding}" for finding in findings if finding.severity == "error"),
        *(f"warning: {line}" for line in shared_lines(warnings, "tensors")),
    ]
