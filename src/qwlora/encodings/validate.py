"""Everything that is wrong or odd about an encodings file, and about it beside its model, gathered.

An `error` makes a runtime compute something else, or nothing; a `warning` is legal and worth a look (a tensor without an encoding stays float).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qwlora.encodings.encodings_file import load_json, parse, to_document
from qwlora.encodings.json_fields import Finding, shown
from qwlora.encodings.model import Encoding, EncodingsFile, IntegerEncoding, LpbqEncoding
from qwlora.encodings.onnx_parameters import Graph, TensorFacts, read_graph
from qwlora.errors import ConversionError, EncodingsFileError


def validate(
    file: EncodingsFile | Path | str, onnx_path: Path | str | None = None
) -> list[Finding]:
    """Findings about a file, or about a value before it is written; with a model, about names, shapes and axes too. Errors first.

    Raises:
        EncodingsFileError: the file is not there or not JSON, or the model is not ONNX. What is wrong inside the JSON is a finding.
        MissingExtraError: a model is given, and onnx is not installed.
    """
    parsed, findings = (
        _writable(file) if isinstance(file, EncodingsFile) else parse(load_json(file))
    )
    graph = read_graph(onnx_path) if onnx_path is not None else None
    if parsed is not None:
        for encoding in parsed.encodings:
            findings += _odd_values(encoding)
        if graph is not None:
            findings += _against_graph(parsed, graph)
    return sorted(findings, key=lambda finding: finding.severity == "warning")


def _writable(file: EncodingsFile) -> tuple[EncodingsFile | None, list[Finding]]:
    try:
        to_document(file)
    except EncodingsFileError as error:
        return None, [Finding("error", "file", "", problem) for problem in error.problems]
    except ConversionError as error:
        return None, [
            Finding("error", "file", "", f"{file.version} cannot hold, or needs: {item}")
            for item in (*error.lost, *error.lacking)
        ]
    return file, []


def _odd_values(encoding: Encoding) -> Iterator[Finding]:
    if not isinstance(encoding, IntegerEncoding):
        return
    lowest = -(2**encoding.bitwidth - 1)
    outside = (encoding.offset < lowest) | (encoding.offset > 0)
    if outside.any():
        found = f"is {encoding.offset[outside][0]}, outside [{lowest}, 0], in {int(outside.sum())} of {encoding.offset.size} grids: zero is not on the grid"
        yield Finding("error", encoding.name, "offset", found)
    elif encoding.symmetric and (encoding.offset != encoding.centre).any():
        found = f"is {encoding.offset.reshape(-1)[0]}, but the encoding is called symmetric; zero is the middle code at {encoding.centre} only"
        yield Finding("warning", encoding.name, "offset", found)


def _against_graph(file: EncodingsFile, graph: Graph) -> Iterator[Finding]:
    for encoding in file.encodings:
        facts = graph.get(encoding.name)
        if facts is None:
            yield Finding(
                "error", encoding.name, "name", "is not the name of a tensor in the graph"
            )
            continue
        if file.parameters is not None and (encoding.name in file.parameters) != facts.parameter:
            said, kind = (
                ("a parameter", "an activation")
                if encoding.name in file.parameters
                else ("an activation", "a parameter")
            )
            yield Finding(
                "error", encoding.name, "section", f"says {said}, but it is {kind} of the graph"
            )
        if facts.shape is not None:
            yield from _shape_findings(encoding, facts, facts.shape)
    named = file.by_name.keys()
    for name, facts in graph.items():
        encoded_after = facts.moved_to and named >= set(facts.moved_to)
        if facts.wanted and name not in named and not encoded_after:
            what = (
                "a parameter of the graph"
                if facts.parameter
                else f"computed by {facts.computed_by}"
                if facts.computed_by
                else "an input of the graph"
            )
            yield Finding(
                "warning", name, "", f"is {what}, without an encoding, and so stays float"
            )


def _shape_findings(
    encoding: Encoding, facts: TensorFacts, shape: tuple[int, ...]
) -> Iterator[Finding]:
    """Whether the scales fit a tensor of `shape`."""
    scale = encoding.block_scale if isinstance(encoding, LpbqEncoding) else encoding.scale
    axis, block_size = encoding.axis, encoding.block_size
    if scale is None or not scale.ndim:
        return
    if axis is not None and not -len(shape) <= axis < len(shape):
        yield Finding(
            "error", encoding.name, "axis", f"is {axis}, outside a tensor of shape {list(shape)}"
        )
        return
    problem = None
    if block_size is None:
        axis = facts.channel_axis if axis is None else axis
        if axis is None and scale.size not in shape:
            problem = f"has {scale.size} values, but no axis of a tensor of shape {list(shape)} is as long"
        elif axis is not None and scale.size != shape[axis]:
            problem = f"has {scale.size} values, but axis {axis} of a tensor of shape {list(shape)} has {shape[axis]}"
    elif axis is None:
        axes = range(len(shape)) if facts.block_axis is None else (facts.block_axis,)
        if not any(
            shape[a] % block_size == 0
            and _blocks(shape, a, block_size, facts.channel_axis) == scale.size
            for a in axes
        ):
            problem = f"has {scale.size} values, which blocks of {block_size} on a tensor of shape {list(shape)} do not give"
    else:
        fits = len(shape) == scale.ndim and shape[axis] == scale.shape[axis] * block_size
        if not fits or any(
            s not in (1, d)
            for i, (s, d) in enumerate(zip(scale.shape, shape, strict=True))
            if i != axis
        ):
            problem = f"has shape {list(scale.shape)}, which blocks of {block_size} on axis {axis} of a tensor of shape {list(shape)} do not give"
    if problem is not None:
        yield Finding("error", encoding.name, "scale", problem)


def _blocks(shape: tuple[int, ...], axis: int, block_size: int, channel_axis: int | None) -> int:
    """How many blocks there are along `axis`, for each channel where the channel axis is known, else for each index of every other axis."""
    count = shape[axis] // block_size
    for a, size in enumerate(shape):
        count *= size if a != axis and channel_axis in (None, a) else 1
    return count


def lines(findings: list[Finding], shown_names: int = 3) -> list[str]:
    """One line a finding; warnings that say the same of many tensors on one line, in which all but the first few are counted."""
    alike: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        alike.setdefault((finding.severity, finding.field, finding.message), []).append(finding)
    result = []
    for finding in findings:
        same = alike[finding.severity, finding.field, finding.message]
        if finding.severity == "error" or len(same) <= shown_names:
            result.append(f"{finding.severity}: {finding}")
        elif finding is same[0]:
            names = ", ".join(shown(other.where) for other in same[:shown_names])
            result.append(
                f"warning: {len(same)} tensors ({names} ...){f', {finding.field}' if finding.field else ''}: each {finding.message}"
            )
    return result


def summary(findings: list[Finding]) -> str:
    """`2 errors, 1 warning`, or `no findings`."""
    errors = sum(f.severity == "error" for f in findings)
    counts = [
        f"{n} {word}{'' if n == 1 else 's'}"
        for n, word in ((errors, "error"), (len(findings) - errors, "warning"))
        if n
    ]
    return ", ".join(counts) or "no findings"
