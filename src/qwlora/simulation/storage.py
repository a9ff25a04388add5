"""A simulation on disk, without pickle:

    FOLDER/simulation.encodings            AIMET's encodings file, version 2.1.0, keyed by module path: activations, adapter, and what step 1 left float
    FOLDER/simulation.json                 the rest of the recipe: schemes, inputs, fingerprints of base and adapter, and why each value has or has not got one
    FOLDER/example_inputs.safetensors      what the graph is captured from

The graph is not stored: it is captured again from base and adapter in seconds, and is theirs. Nor are the encodings of the base's packed weights, which lie in
the base, millions of scales; its fingerprint vouches for them. Float32 scales are written as JSON numbers that read back to the same bits, so the logits of a
simulation that comes back are the same, bit for bit. In the file a symmetric grid is signed and an asymmetric one is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwlora import encodings as files
from qwlora.errors import CalibrationError, EncodingsFileError
from qwlora.grid.encoding import Encoding
from qwlora.grid.fingerprint import adapter_fingerprint, fingerprint
from qwlora.grid.graph import Kind
from qwlora.grid.scheme import PerBlock, PerChannel, PerTensor, Scheme
from qwlora.simulation.simulation import Simulation, SimulationSchemes, simulate

FORMAT = 2
ENCODINGS, RECORD, INPUTS = "simulation.encodings", "simulation.json", "example_inputs.safetensors"
_VERSION = "2.1.0"


def save_simulation(simulation: Simulation, folder: str | Path) -> None:
    """Write a calibrated simulation into `folder`, which is made if it is not there.

    Raises:
        CalibrationError: it is not calibrated, or its example inputs are nested.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: e for name, e in simulation.encodings.items() if name not in simulation.base_encodings}
    origin = simulation.origin
    tensors = {name: value.cpu().contiguous() for name, value in origin.example_inputs.items() if isinstance(value, Tensor)}
    constants = {name: value for name, value in origin.example_inputs.items() if name not in tensors}
    if nested := [name for name, value in constants.items() if not isinstance(value, bool | int | float | str | None)]:
        raise CalibrationError(f"example input {nested[0]} is neither a tensor nor a number; a simulation with nested inputs cannot be saved")
    record = {
        "format": FORMAT,
        "base_fingerprint": fingerprint(origin.model),
        "adapter_fingerprint": origin.adapter_fingerprint,
        "constants": constants,
        "inputs": {name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)} for name, t in tensors.items()},
        "schemes": _schemes_to_json(origin.schemes),
        "encodings": {m.name: m.kind.value for m in simulation.marks if m.name in own},
        "placement": [asdict(p) for p in simulation.explanation],
    }
    (folder / RECORD).unlink(missing_ok=True)  # written last: never an old record beside new encodings
    _write({name: e for name, e in own.items() if isinstance(e, Encoding)}, folder / ENCODINGS)
    save_file(tensors, folder / INPUTS)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def load_simulation(folder: str | Path, model: nn.Module) -> Simulation:
    """The simulation that was saved in `folder`, captured anew from `model`: the same base, with the same adapter.

    Raises:
        CalibrationError: the folder holds no simulation, encodings are missing, or the base or the adapter is another.
    """
    folder = Path(folder)
    record = _read_record(folder)
    for what, found in (("base", fingerprint(model)), ("adapter", adapter_fingerprint(model))):
        if found != (known := record[f"{what}_fingerprint"]):
            raise CalibrationError(
                f"{str(folder)!r} is a simulation of the {what} with fingerprint {known or '(none)'}, but this model's is {found or '(none)'}; "
                "give it the model it was made from, or calibrate again"
            )
    try:
        tensors = load_file(folder / INPUTS)
        schemes = TypeAdapter(SimulationSchemes).validate_python(record["schemes"])
        examples = {**{name: tensors[name] for name in record["inputs"]}, **record["constants"]}
    except (OSError, KeyError, SafetensorError, ValidationError, ValueError) as error:
        raise _unreadable(folder, error) from error
    simulation = simulate(model, examples, schemes)
    restore(simulation, folder)
    return simulation


def restore(simulation: Simulation, folder: Path) -> None:
    """Give a fresh simulation of the same base and adapter the encodings in `folder`.

    Raises:
        CalibrationError: the folder does not hold them, or they belong to other values.
    """
    simulation.restore({**simulation.base_encodings, **load_encodings(folder)})


def load_encodings(folder: Path) -> dict[str, Encoding]:
    """The encodings that `save_simulation` wrote: all but those of the base's packed weights.

    Raises:
        CalibrationError: the folder does not hold them, or not all.
    """
    record = _read_record(folder)
    try:
        found = _read(folder / ENCODINGS)
    except (EncodingsFileError, ValueError) as error:
        raise _unreadable(folder, error) from error
    if missing := [name for name in record["encodings"] if name not in found]:
        raise CalibrationError(f"{len(missing)} encodings are missing from {str(folder / ENCODINGS)!r}, {missing[0]} first; calibrate again")
    return found


def save_shared(encodings: Mapping[str, Encoding], folder: Path) -> None:
    """Write encodings that belong to several simulations into `folder`, which exists."""
    _write(encodings, folder / ENCODINGS)


def load_shared(folder: Path) -> dict[str, Encoding]:
    """What `save_shared` wrote.

    Raises:
        CalibrationError: the folder does not hold it.
    """
    try:
        return _read(folder / ENCODINGS)
    except (EncodingsFileError, ValueError) as error:
        raise _unreadable(folder, error) from error


def load_activations(folder: Path) -> dict[str, Encoding]:
    """Of `load_encodings`, those of activations."""
    kinds = _read_record(folder)["encodings"]
    return {name: e for name, e in load_encodings(folder).items() if kinds.get(name) == Kind.ACTIVATION}


def _write(encodings: Mapping[str, Encoding], file: Path) -> None:
    entries = tuple(_to_file(name, encoding) for name, encoding in encodings.items())
    files.write(files.EncodingsFile(_VERSION, entries, producer={"package": "qwlora", "version": version("qwlora")}), file)


def _read(file: Path) -> dict[str, Encoding]:
    return {entry.name: _from_file(entry) for entry in files.read(file).encodings}


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        if record["format"] != FORMAT or not all(
            key in record for key in ("base_fingerprint", "adapter_fingerprint", "inputs", "constants", "schemes", "encodings")
        ):
            raise ValueError(f"format {record['format']}, and not {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error
    return record


def _unreadable(folder: Path, error: Exception) -> CalibrationError:
    return CalibrationError(f"{str(folder)!r} holds no simulation that can be read ({error}); calibrate again")


def _schemes_to_json(schemes: SimulationSchemes) -> Any:
    adapter = TypeAdapter(SimulationSchemes)
    found = adapter.dump_python(schemes, mode="json")
    assert adapter.validate_python(found) == schemes, "what is written reads back as what it was"
    return found


def _to_file(name: str, encoding: Encoding) -> files.IntegerEncoding:
    scheme, scale = encoding.scheme, encoding.scale.detach().cpu()
    axis = block_size = None
    match scheme.granularity:
        case PerTensor():
            pass
        case PerChannel(channel):
            axis = channel
        case PerBlock(size):
            axis, block_size = scale.ndim - 1, size
        case other:
            raise CalibrationError(f"{name}: a simulation has grids per tensor, channel or block, not {other}")
    offset = encoding.offset.cpu().numpy()
    return files.IntegerEncoding(
        name,
        scheme.bitwidth,
        scale.numpy().astype(np.float64),
        offset,
        symmetric=bool((offset == scheme.symmetric_offset).all()),  # all that 2.1.0 says; what was asked for is in `signed`
        signed=scheme.symmetric,
        axis=axis,
        block_size=block_size,
    )


def _from_file(entry: files.Encoding) -> Encoding:
    if not isinstance(entry, files.IntegerEncoding) or entry.zero_point_shift:
        raise ValueError(f"{entry.name} is no plain integer grid")
    granularity = PerBlock(entry.block_size) if entry.block_size else PerTensor() if entry.axis is None else PerChannel(entry.axis)
    scheme = Scheme(entry.bitwidth, bool(entry.signed), granularity)
    scale = torch.from_numpy(entry.scale.astype(np.float32))
    offset: Tensor = torch.from_numpy(entry.offset.astype(np.int32))
    return Encoding(scheme, scale, offset)
