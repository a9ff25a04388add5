"""The encodings of a stored simulation: AIMET's encodings file, version 2.1.0, keyed by module path.

A symmetric grid is signed there and an asymmetric one is not, which is how both come back: the version itself says only where zero is. Float32 scales are JSON
numbers that read back to the same bits. Needs no transformers, so that any environment reads what this one wrote; `storage.py` has the rest of a simulation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwlora import encodings as files
from qwlora.encodings.from_grid import encoding_of, entry_of
from qwlora.errors import CalibrationError, EncodingsFileError
from qwlora.formats import manifest
from qwlora.graph.quantized_graph import Kind
from qwlora.grid.encoding import Encoding
from qwlora.grid.float_offset import FloatOffsetEncoding

FORMAT = 3  # 3: the record says what calibration left float
ENCODINGS, RECORD = "simulation.encodings", "simulation.json"
_VERSION = "2.1.0"
_KEYS = ("base_fingerprint", "adapter_fingerprint", "inputs", "schemes", "encodings", "dropped")


def save_encodings(encodings: Mapping[str, Encoding | FloatOffsetEncoding], folder: Path) -> None:
    """Write encodings alone into `folder`, with a record of their digest.

    Raises:
        CalibrationError: one has float offsets.
    """
    try:
        entries = tuple(entry_of(name, e, _VERSION) for name, e in encodings.items())
    except EncodingsFileError as error:
        raise CalibrationError(str(error)) from error
    producer = {"package": "qwlora", "version": version("qwlora")}
    files.write(files.EncodingsFile(_VERSION, entries, producer=producer), folder / ENCODINGS)
    manifest.write(folder, RECORD, {"format": FORMAT}, (ENCODINGS,))


def load_encodings(folder: Path) -> dict[str, Encoding]:
    """The encodings in `folder`: of a simulation, all but those of the base's packed weights.

    Raises:
        CalibrationError: the folder does not hold them, or not all.
        FingerprintError: the file changed after it was saved.

    Warns:
        UnverifiedWarning: an earlier version wrote it, without digests.
    """
    if (folder / ENCODINGS).exists():
        check_files(folder, only=[ENCODINGS])
    try:
        found = {
            entry.name: encoding_of(entry) for entry in files.read(folder / ENCODINGS).encodings
        }
    except (EncodingsFileError, ValueError) as error:
        raise unreadable(folder, error) from error
    wanted = _read(folder).get("encodings", ()) if (folder / RECORD).exists() else ()
    if missing := [name for name in wanted if name not in found]:
        raise CalibrationError(
            f"{len(missing)} encodings are missing from {str(folder / ENCODINGS)!r}, {missing[0]} first; calibrate again"
        )
    return found


def load_activations(folder: Path) -> dict[str, Encoding]:
    """Of a simulation's encodings, those of activations."""
    kinds = read_record(folder)["encodings"]
    return {
        name: e for name, e in load_encodings(folder).items() if kinds.get(name) == Kind.ACTIVATION
    }


def read_record(folder: Path) -> dict[str, Any]:
    """What a simulation's folder says besides its encodings.

    Raises:
        CalibrationError: it does not say it.
    """
    record = _read(folder)
    if missing := [key for key in _KEYS if key not in record]:
        raise unreadable(folder, ValueError(f"{RECORD} has no {missing[0]}"))
    return record


def check_files(folder: Path, only: Iterable[str] | None = None) -> None:
    """Compare the files of a simulation with their digests; see `manifest.check`."""
    manifest.check(folder, RECORD, f"simulation {str(folder)!r}", "calibrate again", only)


def _read(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, and not {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise unreadable(folder, error) from error
    return record


def unreadable(folder: Path, error: Exception) -> CalibrationError:
    """The error of a folder that holds no whole simulation."""
    return CalibrationError(
        f"{str(folder)!r} holds no simulation that can be read ({error}); calibrate again"
    )
