"""Write a simulation to a folder, without pickle:

    simulation.encodings            AIMET encodings 2.1.0 by module path: activations, adapter
                                    weights, and what step 1 left float
    simulation.json                 schemes, inputs, fingerprints of base and adapter, the placement
                                    log, and the SHA-256 of the other files (`manifest.py`)
    example_inputs.safetensors      what the graph is captured from

The graph is not stored: `load_simulation` captures it again in seconds. Neither are the encodings
of packed base weights, millions of scales that the base holds; its fingerprint identifies them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file

from qwlora.atomic import replacing_files
from qwlora.errors import CalibrationError
from qwlora.formats import manifest
from qwlora.graph.flat_arguments import CacheSlot, Slot, Structure
from qwlora.grid.encoding import Encoding
from qwlora.nn.fingerprint import fingerprint
from qwlora.simulation.placement import Placement
from qwlora.simulation.simulation_schemes import SimulationSchemes, SimulationSource
from qwlora.simulation.stored_encodings import (
    ENCODINGS,
    FORMAT,
    INPUTS,
    RECORD,
    SLOT,
    TUPLE,
    save_encodings,
)


def write_simulation(
    folder: Path,
    origin: SimulationSource,
    encodings: Mapping[str, Encoding],
    placement: Placement,
    dropped: Iterable[str],
) -> None:
    """Write a calibrated simulation to `folder`, which is created if missing.

    Files from before are replaced only when all new ones are written.

    Args:
        dropped: names of values that calibration left float.

    Raises:
        CalibrationError: an example input is not JSON; or an encoding has float offsets, which the
            encodings file cannot hold.
    """
    arguments, examples = Structure.of(dict(origin.example_inputs))
    record = {
        "format": FORMAT,
        "base_fingerprint": fingerprint(origin.model),
        "adapter_fingerprint": origin.adapter_fingerprint,
        "inputs": _template_to_json(arguments.template, ""),
        "schemes": _schemes_to_json(origin.schemes),
        "encodings": {m.name: m.kind.value for m in placement.marks if m.name in encodings},
        "dropped": sorted(dropped),
        "placement": [value.to_json() for value in placement.explanation],
    }
    with replacing_files(folder, last=RECORD) as scratch:
        save_encodings(encodings, scratch)
        # cloned because safetensors refuses tensors that share memory, as two arguments may
        tensors = {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in zip(arguments.names, examples, strict=True)
        }
        save_file(tensors, scratch / INPUTS)
        manifest.write(scratch, RECORD, record, (ENCODINGS, INPUTS))


def _schemes_to_json(schemes: SimulationSchemes) -> Any:
    adapter = TypeAdapter(SimulationSchemes)
    found = adapter.dump_python(schemes, mode="json")
    assert adapter.validate_python(found) == schemes, "schemes survive a round trip"
    return found


def _template_to_json(template: Any, path: str) -> Any:
    """Example inputs with the name of each tensor in its place."""
    match template:
        case Slot():
            return {SLOT: template.name}
        case CacheSlot():
            pairs = [{TUPLE: [{SLOT: slot.name} for slot in pair]} for pair in template.layers]
            return {TUPLE: pairs}
        case Mapping():
            return {
                key: _template_to_json(inner, f"{path}.{key}" if path else str(key))
                for key, inner in template.items()
            }
        case list() | tuple():
            items = [_template_to_json(inner, f"{path}.{i}") for i, inner in enumerate(template)]
            return items if isinstance(template, list) else {TUPLE: items}
        case None | bool() | int() | float() | str():
            return template
    raise CalibrationError(
        f"example input {path or '(all)'} is a {type(template).__name__}, which JSON cannot hold. "
        "Give tensors, numbers or strings"
    )
