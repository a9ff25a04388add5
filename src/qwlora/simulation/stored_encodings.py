"""The files of a saved simulation that can be read without transformers: encodings and record.

Encodings are an AIMET file, version 2.1.0, by module path. That version stores where zero is, not
whether a grid is symmetric: a signed grid is read back as symmetric, an unsigned one as asymmetric,
which is how they are written. Float32 scales are JSON numbers that read back to the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwlora import encodings as files
from qwlora.encodings.grids import encoding_of, entry_of
from qwlora.errors import CalibrationError, EncodingsFileError
from qwlora.formats import manifest
from qwlora.graph.quantized_graph import Kind
from qwlora.grid.encoding import Encoding

FORMAT = 3  # 3: the record names what calibration left float
ENCODINGS, RECORD = "simulation.encodings", "simulation.json"
INPUTS = "example_inputs.safetensors"
SLOT, TUPLE = "$tensor", "$tuple"  # keys of the record's `inputs`
_VERSION = "2.1.0"
_KEYS = ("base_fingerprint", "adapter_fingerprint", "inputs", "schemes", "encodings", "dropped")


def save_encodings(encodings: Mapping[str, Encoding], folder: Path) -> None:
    """Write encodings into `folder`, with a record of their digest.

    Raises:
        CalibrationError: an encoding has float offsets.
    """
    try:
        entries = tuple(entry_of(name, e, _VERSION) for name, e in encodings.items())
    except EncodingsFileError as error:
        raise CalibrationError(str(error)) from error
    producer = {"package": "qwlora", "version": version("qwlora")}
    files.write_encodings(
        files.EncodingsFile(_VERSION, entries, producer=producer), folder / ENCODINGS
    )
    manifest.write(folder, RECORD, {"format": FORMAT}, (ENCODINGS,))


def load_encodings(folder: Path) -> dict[str, Encoding]:
    """The encodings in `folder`. A simulation's folder has all but those of packed base weights.

    Raises:
        CalibrationError: encodings are missing, or the file cannot be read.
        FingerprintError: the file changed after it was saved.

    Warns:
        UnverifiedWarning: an earlier version wrote it, without digests.
    """
    if (folder / ENCODINGS).exists():
        check_files(folder, only=[ENCODINGS])
    try:
        found = {
            entry.name: encoding_of(entry)
            for entry in files.read_encodings(folder / ENCODINGS).encodings
        }
    except (EncodingsFileError, ValueError) as error:
        raise unreadable(folder, error) from error
    expected = _read(folder).get("encodings", ()) if (folder / RECORD).exists() else ()
    missing = [name for name in expected if name not in found]
    if missing:
        raise CalibrationError(
            f"{str(folder / ENCODINGS)!r} lacks {len(missing)} encodings, {missing[0]} first. "
            "Calibrate again"
        )
    return found


def load_activations(folder: Path) -> dict[str, Encoding]:
    """The activation encodings of the simulation in `folder`."""
    kinds = read_record(folder)["encodings"]
    return {
        name: e for name, e in load_encodings(folder).items() if kinds.get(name) == Kind.ACTIVATION
    }


def read_record(folder: Path) -> dict[str, Any]:
    """`simulation.json`.

    Raises:
        CalibrationError: it cannot be read, or lacks a key.
    """
    record = _read(folder)
    missing = [key for key in _KEYS if key not in record]
    if missing:
        raise unreadable(folder, ValueError(f"{RECORD} has no {missing[0]}"))
    return record


def check_files(folder: Path, only: Iterable[str] | None = None) -> None:
    """Compare the files of a simulation with their digests; see `manifest.check`."""
    manifest.check(folder, RECORD, f"simulation {str(folder)!r}", "calibrate again", only)


def _read(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, expected {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise unreadable(folder, error) from error
    return record


def unreadable(folder: Path, error: Exception) -> CalibrationError:
    """The error of a folder without a complete simulation."""
    return CalibrationError(
        f"{str(folder)!r} holds no readable simulation ({error}). Calibrate again"
    )
