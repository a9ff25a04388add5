"""A simulation on disk, without pickle:

    FOLDER/simulation.encodings            AIMET's encodings file, version 2.1.0, keyed by module path: activations, adapter, and what step 1 left float
    FOLDER/simulation.json                 the rest of the recipe: schemes, inputs, fingerprints of base and adapter, and why each value has or has not got one;
                                           SHA-256 of the files here (`manifest.py`)
    FOLDER/example_inputs.safetensors      what the graph is captured from

The graph is not stored: it is captured again from base and adapter in seconds, and is theirs. Nor are the encodings of the base's packed weights, which lie in
the base, millions of scales; its fingerprint vouches for them. The logits of a simulation that comes back are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwlora.atomic import replacing_files
from qwlora.errors import CalibrationError
from qwlora.formats import manifest
from qwlora.graph.flat_arguments import CacheSlot, Slot, Structure
from qwlora.graph.move_graph import device_of
from qwlora.nn.fingerprint import adapter_fingerprint, fingerprint
from qwlora.parameter_names import is_adapter_name
from qwlora.simulation.adapter_simulations import BASE, simulate_adapters
from qwlora.simulation.simulation import Simulation, SimulationSchemes, simulate
from qwlora.simulation.stored_encodings import (
    ENCODINGS,
    FORMAT,
    RECORD,
    check_files,
    load_encodings,
    read_record,
    save_encodings,
    unreadable,
)

INPUTS = "example_inputs.safetensors"
_SLOT, _TUPLE = "$tensor", "$tuple"


def save_simulation(simulation: Simulation, folder: str | Path, with_base: bool = False) -> None:
    """Write a calibrated simulation into `folder`, which is made if it is not there. What it held stays until all is written.

    Args:
        with_base: write the encodings of the base's packed weights too, for a reader that has not the base.

    Raises:
        CalibrationError: it is not calibrated; or `with_base` where the base has float offsets, which the file cannot hold.
    """
    folder = Path(folder)
    own = {
        name: e
        for name, e in simulation.encodings.items()
        if with_base or name not in simulation.base_encodings
    }
    origin = simulation.origin
    arguments, examples = Structure.of(dict(origin.example_inputs))
    record = {
        "format": FORMAT,
        "base_fingerprint": fingerprint(origin.model),
        "adapter_fingerprint": origin.adapter_fingerprint,
        "inputs": _template_to_json(arguments.template, ""),
        "schemes": _schemes_to_json(origin.schemes),
        "encodings": {m.name: m.kind.value for m in simulation.marks if m.name in own},
        "dropped": sorted(simulation.dropped),
        "placement": [asdict(p) for p in simulation.explanation],
    }
    with replacing_files(folder, last=RECORD) as scratch:
        save_encodings(own, scratch)
        # two arguments may be one tensor, which the file would not take
        save_file(
            {
                name: tensor.cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in zip(arguments.names, examples, strict=True)
            },
            scratch / INPUTS,
        )
        manifest.write(scratch, RECORD, record, (ENCODINGS, INPUTS))


def load_simulation(folder: str | Path, model: nn.Module) -> Simulation:
    """The simulation that was saved in `folder`, captured anew from `model`: the same base, with the same adapter, on whatever device it is.

    That of the adapter that adds zero (`simulate_adapters(...)["base"]`) takes the shape of the model's active adapter, whatever its weights.

    Raises:
        CalibrationError: the folder holds no simulation, encodings are missing, or the base or the adapter is another.
        GridError: the shape is not that of the adapter that added zero.
        FingerprintError: a file changed after it was saved.

    Warns:
        UnverifiedWarning: an earlier version wrote it, without digests.
    """
    folder = Path(folder)
    record = read_record(folder)
    check_files(folder)
    adds_zero = record["adapter_fingerprint"] is None and any(
        is_adapter_name(name) for name in record["encodings"]
    )
    adapter = adapter_fingerprint(model)
    if adds_zero and adapter is None:
        raise CalibrationError(
            f"{str(folder)!r} is a simulation of an adapter that adds zero; give it a model with an adapter of that shape, active"
        )
    for what, found in (("base", fingerprint(model)), ("adapter", None if adds_zero else adapter)):
        if found != (known := record[f"{what}_fingerprint"]):
            raise CalibrationError(
                f"{str(folder)!r} is a simulation of the {what} with fingerprint {known or '(none)'}, but this model's is {found or '(none)'}; "
                "give it the model it was made from, or calibrate again"
            )
    try:
        tensors = {
            name: tensor.to(device_of(model)) for name, tensor in load_file(folder / INPUTS).items()
        }
        schemes = TypeAdapter(SimulationSchemes).validate_python(record["schemes"])
        examples = _template_from_json(record["inputs"], tensors)
    except (OSError, KeyError, SafetensorError, ValidationError, ValueError) as error:
        raise unreadable(folder, error) from error
    if adds_zero:
        assert isinstance(model, PeftModel)
        simulation = simulate_adapters(model, examples, schemes, adapters=[model.active_adapter])[
            BASE
        ]
    else:
        simulation = simulate(model, examples, schemes)
    simulation.set_adapter_encodings(
        load_encodings(folder)
    )  # adapters that share every encoding lie on grids that their own values do not give
    restore(simulation, folder)
    return simulation


def restore(simulation: Simulation, folder: Path) -> None:
    """Give a fresh simulation of the same base and adapter the encodings in `folder`.

    Raises:
        CalibrationError: the folder does not hold them, or they belong to other values.
    """
    simulation.restore(
        {**simulation.base_encodings, **load_encodings(folder)}, read_record(folder)["dropped"]
    )


def _schemes_to_json(schemes: SimulationSchemes) -> Any:
    adapter = TypeAdapter(SimulationSchemes)
    found = adapter.dump_python(schemes, mode="json")
    assert adapter.validate_python(found) == schemes, "what is written reads back as what it was"
    return found


def _template_to_json(template: Any, path: str) -> Any:
    """Example inputs without their tensors, a tensor's name in its place."""
    if isinstance(template, Slot):
        return {_SLOT: template.name}
    if isinstance(template, CacheSlot):
        return {
            _TUPLE: [{_TUPLE: [{_SLOT: part.name} for part in pair]} for pair in template.layers]
        }
    if isinstance(template, Mapping):
        return {
            key: _template_to_json(inner, f"{path}.{key}" if path else str(key))
            for key, inner in template.items()
        }
    if isinstance(template, list):
        return [_template_to_json(inner, f"{path}.{index}") for index, inner in enumerate(template)]
    if isinstance(template, tuple):
        return {
            _TUPLE: [
                _template_to_json(inner, f"{path}.{index}") for index, inner in enumerate(template)
            ]
        }
    if template is None or isinstance(template, bool | int | float | str):
        return template
    raise CalibrationError(
        f"example input {path or '(all)'} is a {type(template).__name__}, which JSON cannot hold; give tensors, numbers or text"
    )


def _template_from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_template_from_json(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if _SLOT in value:
        return tensors[value[_SLOT]]
    if _TUPLE in value:
        return tuple(_template_from_json(inner, tensors) for inner in value[_TUPLE])
    return {key: _template_from_json(inner, tensors) for key, inner in value.items()}
