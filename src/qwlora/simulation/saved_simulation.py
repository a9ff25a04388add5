"""A simulation in a folder, without pickle:

    simulation.encodings            AIMET encodings 2.1.0 by module path: activations, adapter
                                    weights, and other float weights
    simulation.json                 schemes, inputs, fingerprints of base and adapter, the ranks to
                                    which it was padded, the placement log, and the SHA-256 of the
                                    other files (`manifest.py`)
    example_inputs.safetensors      the inputs that the graph is captured from

The graph is not stored: `load_simulation` captures it again in seconds. Neither are the encodings
of packed base weights, millions of scales that the base holds; its fingerprint identifies them.

Version 2.1.0 stores the zero point, but not whether a grid is symmetric. So symmetric grids are
written as signed and asymmetric ones as unsigned, and read back accordingly. Float32 scales are
JSON numbers that read back to the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from qwlora.adapter.attach import active_adapters
from qwlora.adapter.mergeable import is_mergeable
from qwlora.errors import CalibrationError, CaptureError
from qwlora.formats import aimet_encodings as files
from qwlora.formats import manifest
from qwlora.formats.aimet_encodings.grids import encoding_of, entry_of
from qwlora.graph.call_arguments import CacheSlot, Slot, Structure
from qwlora.graph.quantized_graph import Kind
from qwlora.grid.encoding import Encoding
from qwlora.nn.fingerprint import adapter_fingerprint, fingerprint
from qwlora.simulation.placement import Placement
from qwlora.simulation.placement_rules import Schemes
from qwlora.system.atomic import replacing_files
from qwlora.system.regular_files import check_readable

ENCODINGS, RECORD = "simulation.encodings", "simulation.json"
INPUTS = "example_inputs.safetensors"
_TENSOR = "$tensor"  # key of a tensor's name among the record's inputs
_VERSION = "2.1.0"


@dataclass(frozen=True)
class SimulationSource:
    """The model that a simulation was made from, with the fingerprints that its base and its active
    adapter had then (None: no adapter or a zero adapter), before padding to `ranks`."""

    model: nn.Module
    example_inputs: Mapping[str, Any]
    schemes: Schemes
    base_fingerprint: str
    adapter_fingerprint: str | None
    adapters: tuple[str, ...]
    ranks: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: Mapping[str, Any],
        schemes: Schemes,
        ranks: Mapping[str, int] | None = None,
        base_fingerprint: str | None = None,
    ) -> SimulationSource:
        if is_mergeable(model, active := active_adapters(model)):
            raise CaptureError(
                f"adapter {', '.join(active)} is mergeable and cannot be simulated as a separate "
                "branch. Merge it first: qwlora.merged_model(model)"
            )
        base, adapter = base_fingerprint or fingerprint(model), adapter_fingerprint(model)
        adapters = () if adapter is None else tuple(active)
        inputs = dict(example_inputs)
        return cls(model, inputs, schemes, base, adapter, adapters, ranks or {})


class Record(BaseModel):
    """`simulation.json`."""

    format: Literal[4] = 4
    base_fingerprint: str
    adapter_fingerprint: str | None
    ranks: dict[str, int]
    inputs: dict[str, Any]
    schemes: Schemes
    encodings: dict[str, Kind]
    dropped: list[str]
    placement: dict[str, Any]


def write_simulation(
    folder: Path,
    origin: SimulationSource,
    placement: Placement,
    encodings: Mapping[str, Encoding],
    dropped: Iterable[str],
) -> None:
    """Write a calibrated simulation to `folder`. `dropped`: values that calibration left float."""
    arguments, examples = Structure.of(dict(origin.example_inputs))
    inputs = {
        name: json.loads(json.dumps(argument, default=partial(_named, name)))
        for name, argument in arguments.template.items()
    }
    record = Record(
        base_fingerprint=origin.base_fingerprint,
        adapter_fingerprint=origin.adapter_fingerprint,
        ranks=dict(origin.ranks),
        inputs=inputs,
        schemes=origin.schemes,
        encodings={mark.name: mark.kind for mark in placement.marks if mark.name in encodings},
        dropped=sorted(dropped),
        placement=placement.to_json(),
    )
    with replacing_files(folder, last=RECORD) as scratch:
        save_encodings(encodings, scratch)
        # cloned because safetensors refuses tensors that share memory, as two arguments may
        tensors = {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in zip(arguments.names, examples, strict=True)
        }
        save_file(tensors, scratch / INPUTS)
        manifest.write(scratch, RECORD, record.model_dump(mode="json"), (ENCODINGS, INPUTS))


def save_encodings(encodings: Mapping[str, Encoding], folder: Path) -> None:
    """Write encodings into `folder`, with a record of their digest."""
    entries = tuple(entry_of(name, e, _VERSION) for name, e in encodings.items())
    producer = {"package": "qwlora", "version": version("qwlora")}
    file = files.EncodingsFile(_VERSION, entries, producer=producer)
    files.write_encodings(file, folder / ENCODINGS)
    manifest.write(folder, RECORD, {}, (ENCODINGS,))


def load_encodings(folder: Path) -> dict[str, Encoding]:
    """The encodings in `folder`. A simulation's folder has all except those of packed weights."""
    if (folder / ENCODINGS).exists():
        name = f"simulation {str(folder)!r}"
        manifest.check(folder, RECORD, name, "calibrate again", [ENCODINGS])
    with _reading(folder):
        entries = files.read_encodings(folder / ENCODINGS).encodings
        return {entry.name: encoding_of(entry) for entry in entries}


def load_activations(folder: Path) -> dict[str, Encoding]:
    """The activation encodings of the simulation in `folder`."""
    kinds = read_record(folder).encodings
    return {n: e for n, e in load_encodings(folder).items() if kinds.get(n) is Kind.ACTIVATION}


def read_record(folder: Path) -> Record:
    """`simulation.json`."""
    with _reading(folder):
        check_readable(folder)
        return Record.model_validate_json((folder / RECORD).read_bytes())


def read_inputs(folder: Path, record: Record, device: torch.device) -> dict[str, Any]:
    """The example inputs that the graph is captured from."""
    with _reading(folder):
        tensors = {name: tensor.to(device) for name, tensor in load_file(folder / INPUTS).items()}
        inputs: dict[str, Any] = json.loads(
            json.dumps(record.inputs),
            object_hook=lambda part: tensors[part[_TENSOR]] if _TENSOR in part else part,
        )
    return inputs


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CalibrationError(
            f"{str(folder)!r} holds no readable simulation ({error}). Calibrate again"
        ) from error


def _named(argument: str, part: Any) -> Any:
    """An example input as JSON, with the name of each tensor instead of the tensor."""
    if isinstance(part, Slot):
        return {_TENSOR: part.name}
    if isinstance(part, CacheSlot):
        return part.layers
    raise CalibrationError(
        f"example input {argument} holds a {type(part).__name__}, which JSON cannot hold. "
        "Give tensors, numbers or strings"
    )
