"""Read and write encodings files.

    read(path)           an EncodingsFile, or EncodingsFileError with every problem
    write(file, path)    atomic, in the file's version, or ConversionError if that cannot express it

Files are not trusted: reading takes time and memory proportional to the size, up to `LIMIT_BYTES`,
and raises only these errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qwlora.atomic import write_text
from qwlora.encodings.convert import convert
from qwlora.encodings.json_fields import FieldError, Finding, Record, describe, printable, text_of
from qwlora.encodings.model import VERSIONS, Encoding, EncodingsFile, repeated
from qwlora.encodings.version_2 import build_2, parse_2
from qwlora.encodings.versions_0_and_1 import build_0_6_1, build_1_0_0, parse_0_6_1, parse_1_0_0
from qwlora.errors import EncodingsFileError

LIMIT_BYTES = 2**31
SECTIONS = ("activation_encodings", "param_encodings")


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


def write(file: EncodingsFile, path: Path | str) -> None:
    """Write `file` in its own version; on an error the path keeps its old content.

    Raises:
        ConversionError: the version cannot express the content, or needs more.
        EncodingsFileError: a number is out of range, or the path cannot be written.
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
    return (
        "{\n"
        + ",\n".join(
            f" {json.dumps(key)}: {_lines(value)}" for key, value in to_document(file).items()
        )
        + "\n}\n"
    )


def _lines(value: Any) -> str:
    """JSON; a list of objects, or an object of lists, with one item per line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return (
            "[\n  " + ",\n  ".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n ]"
        )
    if isinstance(value, dict) and any(isinstance(entry, list) for entry in value.values()):
        return (
            "{\n  "
            + ",\n  ".join(
                f"{json.dumps(name)}: {json.dumps(entry, allow_nan=False)}"
                for name, entry in value.items()
            )
            + "\n }"
        )
    return json.dumps(value, allow_nan=False)


def to_document(file: EncodingsFile) -> dict[str, Any]:
    """The JSON value that `write` writes.

    Raises:
        ConversionError, EncodingsFileError: as `write`.
    """
    if file.version not in VERSIONS:
        raise EncodingsFileError(
            "encodings",
            [f"version {printable(file.version)!r} is not one of {', '.join(VERSIONS)}"],
        )
    convert(file, file.version)
    document: dict[str, Any] = {"version": file.version}
    if file.producer is not None:
        document["producer"] = dict(file.producer)
    document |= (
        _build_sections(file)
        if file.version < "2"
        else {"encodings": [build_2(e, file.version) for e in file.encodings]}
    )
    if file.excluded_layers is not None:
        document["excluded_layers"] = list(file.excluded_layers)
    if file.quantizer_args is not None:
        document["quantizer_args"] = dict(file.quantizer_args)
    again, findings = parse(document)
    if again is None:
        raise EncodingsFileError("encodings", [str(finding) for finding in findings])
    return document


def _build_sections(file: EncodingsFile) -> dict[str, Any]:
    assert file.parameters is not None, "convert requires it"
    members = (
        [e for e in file.encodings if e.name not in file.parameters],
        [e for e in file.encodings if e.name in file.parameters],
    )
    if file.version == "0.6.1":
        return {
            section: {e.name: build_0_6_1(e) for e in some}
            for section, some in zip(SECTIONS, members, strict=True)
        }
    return {
        section: [build_1_0_0(e) for e in some]
        for section, some in zip(SECTIONS, members, strict=True)
    }


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
    except FieldError as error:
        problem = str(error)
    except RecursionError:
        problem = "is nested too deeply for an encodings file"
    except ValueError:
        problem = "contains an integer of thousands of digits"
    raise EncodingsFileError(str(path), [problem])


def _reason(error: OSError | ValueError) -> str:
    """The operating system's message without the path, or that of a path that it cannot take."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = repeated(key for key, _ in pairs)[0]
        raise FieldError(f"has the key {printable(twice)!r} twice in one object")
    return values


def parse(document: Any) -> tuple[EncodingsFile | None, list[Finding]]:
    """The file that a JSON value describes, or None and every problem."""
    findings: list[Finding] = []
    top = Record(document, "file", findings)
    version = top.text("version", VERSIONS)
    if version is None:
        return None, findings
    read_entries = {"0.6.1": _parse_entries_0_6_1, "1.0.0": _parse_entries_1_0_0}.get(
        version, _parse_entries_2
    )
    sections = SECTIONS if version < "2" else ("encodings",)
    parsed = [
        read_entries(top.value(section), section, version, findings)
        if top.has(section)
        else top.value(section)
        for section in sections
    ]
    optional: dict[str, Callable[[Any], Any]] = {"producer": _producer}
    if version < "2":
        optional |= {"excluded_layers": _names, "quantizer_args": _plain_values}
    rest = {key: _optional(top, key, check) for key, check in optional.items()}
    top.close()
    encodings = tuple(e for section in parsed for e in section or ())
    findings += _duplicates(encodings)
    if findings:
        return None, findings
    parameters = frozenset(e.name for e in parsed[1] or ()) if version < "2" else None
    return EncodingsFile(version, encodings, parameters, **rest), findings


def _parse_entries_0_6_1(
    section: Any, key: str, version: str, findings: list[Finding]
) -> list[Encoding]:
    entries = Record(section, key, findings).values
    reports = ((name, items, Record({}, name or "''", findings)) for name, items in entries.items())
    parsed = [parse_0_6_1(name, items, report) for name, items, report in reports]
    if "" in entries:
        findings.append(Finding("error", key, "", "has an entry without a name"))
    return [e for e in parsed if e is not None]


def _parse_entries_1_0_0(
    section: Any, key: str, version: str, findings: list[Finding]
) -> list[Encoding]:
    return _parse_list(section, key, findings, parse_1_0_0)


def _parse_entries_2(
    section: Any, key: str, version: str, findings: list[Finding]
) -> list[Encoding]:
    return _parse_list(section, key, findings, lambda record: parse_2(record, version))


def _parse_list(
    section: Any,
    key: str,
    findings: list[Finding],
    parse_entry: Callable[[Record], Encoding | None],
) -> list[Encoding]:
    if not isinstance(section, list):
        findings.append(
            Finding("error", key, "", f"is {describe(section)}; a list of entries is needed")
        )
        return []
    parsed = []
    for i, entry in enumerate(section):
        name = entry.get("name") if isinstance(entry, dict) else None
        record = Record(entry, name if isinstance(name, str) and name else f"{key}[{i}]", findings)
        parsed.append(parse_entry(record) if isinstance(entry, dict) else None)
    return [e for e in parsed if e is not None]


def _duplicates(encodings: tuple[Encoding, ...]) -> list[Finding]:
    return [
        Finding("error", name, "name", "is repeated; a tensor has one encoding")
        for name in repeated(e.name for e in encodings)
    ]


def _optional(top: Record, key: str, check: Callable[[Any], Any]) -> Any:
    value = top.value(key, required=False)
    if not top.has(key):
        return None
    try:
        return check(value)
    except FieldError as error:
        top.error(key, str(error))
        return None


_PRODUCER = {"package", "version", "block_order"}  # the last in our own files only


def _producer(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not value.keys() <= _PRODUCER:
        raise FieldError("must be an object of package and version")
    return {key: text_of(v) for key, v in value.items()}


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise FieldError(f"is {describe(value)}; a list of names is needed")
    return tuple(text_of(name) for name in value)


def _plain_values(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError(f"is {describe(value)}; an object is needed")
    for key, v in value.items():
        if not isinstance(v, str | bool | int | float) or (
            isinstance(v, float) and not np.isfinite(v)
        ):
            raise FieldError(
                f"has {describe(v)} under {printable(key)!r}; a string, a finite number, true or "
                "false is needed"
            )
    return value
