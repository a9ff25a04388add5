"""A simulation in a folder, without pickle:

    simulation.encodings            AIMET encodings 2.1.0 by module path: activations, adapter
                                    weights, and what step 1 left float
    simulation.json                 schemes, inputs, fingerprints of base and adapter, the placement
                                    log, and the SHA-256 of the other files (`manifest.py`)
    example_inputs.safetensors      what the graph is captured from

The graph is not stored: `load_simulation` captures it again in seconds. Neither are the encodings
of packed base weights, millions of scales that the base holds; its fingerprint identifies them.

Version 2.1.0 stores where zero is, not whether a grid is symmetric: a signed grid is read back as
symmetric, an unsigned one as asymmetric, which is how they are written. Float32 scales are JSON
numbers that read back to the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwlora.errors import CalibrationError, EncodingsFileError
from qwlora.formats import aimet_encodings as files
from qwlora.formats import manifest
from qwlora.formats.aimet_encodings.grids import encoding_of, entry_of
from qwlora.graph.flat_arguments import CacheSlot, Slot, Structure
from qwlora.graph.quantized_graph import Kind
from qwlora.grid.encoding import Encoding
from qwlora.nn.fingerprint import fingerprint
from qwlora.simulation.placement import Placement
from qwlora.simulation.simulation_schemes import Schemes, SimulationSource
from qwlora.system.atomic import replacing_files

FORMAT = 3
ENCODINGS, RECORD = "simulation.encodings", "simulation.json"
INPUTS = "example_inputs.safetensors"
_SLOT, _TUPLE = "$tensor", "$tuple"  # keys of the record's `inputs`
_VERSION = "2.1.0"
_KEYS = ("base_fingerprint", "adapter_fingerprint", "inputs", "schemes", "encodings", "dropped")


def write_simulation(
    folder: Path,
    origin: SimulationSource,
    placement: Placement,
    encodings: Mapping[str, Encoding],
    dropped: Iterable[str],
) -> None:
    """Write a calibrated simulation to `folder`, which is created if missing.

    Files from before are replaced only when all new ones are written.

    Args:
        encodings: to store.
        dropped: names of values that calibration left float.

    Raises:
        CalibrationError: an example input is not JSON; or an encoding has float offsets, which the
            encodings file cannot hold.
    """
    arguments, examples = Structure.of(dict(origin.example_inputs))
    schemes = TypeAdapter(Schemes)
    record = {
        "format": FORMAT,
        "base_fingerprint": fingerprint(origin.model),
        "adapter_fingerprint": origin.adapter_fingerprint,
        "inputs": _to_json(arguments.template, ""),
        "schemes": schemes.dump_python(origin.schemes, mode="json"),
        "encodings": {m.name: m.kind.value for m in placement.marks if m.name in encodings},
        "dropped": sorted(dropped),
        "placement": [value.to_json() for value in placement.explanation],
    }
    assert schemes.validate_python(record["schemes"]) == origin.schemes, "survives a round trip"
    with replacing_files(folder, last=RECORD) as scratch:
        save_encodings(encodings, scratch)
        # cloned because safetensors refuses tensors that share memory, as two arguments may
        tensors = {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in zip(arguments.names, examples, strict=True)
        }
        save_file(tensors, scratch / INPUTS)
        manifest.write(scratch, RECORD, record, (ENCODINGS, INPUTS))


def save_encodings(encodings: Mapping[str, Encoding], folder: Path) -> None:
    """Write encodings into `folder`, with a record of their digest."""
    try:
        entries = tuple(entry_of(name, e, _VERSION) for name, e in encodings.items())
    except EncodingsFileError as error:
        raise CalibrationError(str(error)) from error
    producer = {"package": "qwlora", "version": version("qwlora")}
    file = files.EncodingsFile(_VERSION, entries, producer=producer)
    files.write_encodings(file, folder / ENCODINGS)
    manifest.write(folder, RECORD, {"format": FORMAT}, (ENCODINGS,))


def load_encodings(folder: Path) -> dict[str, Encoding]:
    """The encodings in `folder`. A simulation's folder has all but those of packed base weights.

    Raises:
        CalibrationError: encodings are missing, or the file cannot be read.
        FingerprintError: the file changed after it was saved.
    """
    if (folder / ENCODINGS).exists():
        check_files(folder, only=[ENCODINGS])
    try:
        entries = files.read_encodings(folder / ENCODINGS).encodings
        encodings = {entry.name: encoding_of(entry) for entry in entries}
    except (EncodingsFileError, ValueError) as error:
        raise _unreadable(folder, error) from error
    expected = _read(folder).get("encodings", ()) if (folder / RECORD).exists() else ()
    if missing := [name for name in expected if name not in encodings]:
        raise CalibrationError(
            f"{str(folder / ENCODINGS)!r} lacks {len(missing)} encodings, {missing[0]} first. "
            "Calibrate again"
        )
    return encodings


def load_activations(folder: Path) -> dict[str, Encoding]:
    """The activation encodings of the simulation in `folder`."""
    kinds = read_record(folder)["encodings"]
    return {
        name: e for name, e in load_encodings(folder).items() if kinds.get(name) == Kind.ACTIVATION
    }


def read_record(folder: Path) -> dict[str, Any]:
    """`simulation.json`."""
    record = _read(folder)
    if missing := [key for key in _KEYS if key not in record]:
        raise _unreadable(folder, ValueError(f"{RECORD} has no {missing[0]}"))
    return record


def read_examples(
    folder: Path, record: Mapping[str, Any], device: torch.device
) -> tuple[dict[str, Any], Schemes]:
    """What to capture the graph from, and on which schemes."""
    try:
        tensors = {n: tensor.to(device) for n, tensor in load_file(folder / INPUTS).items()}
        schemes = TypeAdapter(Schemes).validate_python(record["schemes"])
        return _from_json(record["inputs"], tensors), schemes
    except (OSError, KeyError, SafetensorError, ValidationError, ValueError) as error:
        raise _unreadable(folder, error) from error


def check_files(folder: Path, only: Iterable[str] | None = None) -> None:
    """Compare the files of a simulation with their digests; see `manifest.check`."""
    manifest.check(folder, RECORD, f"simulation {str(folder)!r}", "calibrate again", only)


def _read(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, expected {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(folder, error) from error
    return record


def _unreadable(folder: Path, error: Exception) -> CalibrationError:
    return CalibrationError(
        f"{str(folder)!r} holds no readable simulation ({error}). Calibrate again"
    )


def _to_json(template: Any, path: str) -> Any:
    """Example inputs with the name of each tensor in its place."""
    match template:
        case Slot():
            return {_SLOT: template.name}
        case CacheSlot():
            return {_TUPLE: [_to_json(pair, path) for pair in template.layers]}
        case Mapping():
            prefix = f"{path}." if path else ""
            return {key: _to_json(item, f"{prefix}{key}") for key, item in template.items()}
        case list() | tuple():
            items = [_to_json(item, f"{path}.{i}") for i, item in enumerate(template)]
            return items if isinstance(template, list) else {_TUPLE: items}
        case None | bool() | int() | float() | str():
            return template
    raise CalibrationError(
        f"example input {path or '(all)'} is a {type(template).__name__}, which JSON cannot hold. "
        "Give tensors, numbers or strings"
    )


def _from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _SLOT in value:
        return tensors[value[_SLOT]]
    if _TUPLE in value:
        return tuple(_from_json(item, tensors) for item in value[_TUPLE])
    return {key: _from_json(item, tensors) for key, item in value.items()}
