"""Read what `save_simulation.py` wrote: capture the graph again and restore its encodings.

The logits of a loaded simulation are those of the saved one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qwlora.adapter.active_adapters import active_adapter
from qwlora.errors import CalibrationError
from qwlora.graph.move_graph import device_of
from qwlora.nn.fingerprint import adapter_fingerprint, fingerprint
from qwlora.parameter_names import is_adapter_name
from qwlora.simulation.adapter_simulations import BASE, simulate_adapters
from qwlora.simulation.simulation import Simulation, simulate
from qwlora.simulation.simulation_schemes import SimulationSchemes
from qwlora.simulation.stored_encodings import (
    INPUTS,
    SLOT,
    TUPLE,
    check_files,
    load_encodings,
    read_record,
    unreadable,
)


def load_simulation(folder: str | Path, model: nn.Module) -> Simulation:
    """The simulation that was saved in `folder`, captured again from `model`.

    Args:
        model: the same base with the same adapter, on any device. For the zero adapter
            (`simulate_adapters(...)["base"]`) any adapter of the same shape.

    Raises:
        CalibrationError: the folder holds no complete simulation, or the base or the adapter has
            another fingerprint.
        GridError: the adapter does not have the shape of the saved zero adapter.
        FingerprintError: a file changed after it was saved.
    """
    folder = Path(folder)
    record = read_record(folder)
    check_files(folder)
    is_zero_adapter = record["adapter_fingerprint"] is None and any(
        is_adapter_name(name) for name in record["encodings"]
    )
    _check_fingerprints(folder, record, model, is_zero_adapter)
    try:
        tensors = {
            name: tensor.to(device_of(model)) for name, tensor in load_file(folder / INPUTS).items()
        }
        schemes = TypeAdapter(SimulationSchemes).validate_python(record["schemes"])
        examples = _template_from_json(record["inputs"], tensors)
    except (OSError, KeyError, SafetensorError, ValidationError, ValueError) as error:
        raise unreadable(folder, error) from error
    if is_zero_adapter:
        made = simulate_adapters(model, examples, schemes, adapters=[active_adapter(model)])
        simulation = made[BASE]
    else:
        simulation = simulate(model, examples, schemes)
    # shared adapter encodings are not those measured from this adapter's own values
    simulation.set_adapter_encodings(load_encodings(folder))
    restore(simulation, folder)
    return simulation


def restore(simulation: Simulation, folder: Path) -> None:
    """Give an uncalibrated simulation of the same base and adapter the encodings in `folder`.

    Raises:
        CalibrationError: the folder does not hold them, or they belong to other values.
    """
    simulation.restore(
        {**simulation.base_encodings, **load_encodings(folder)}, read_record(folder)["dropped"]
    )


def _check_fingerprints(
    folder: Path, record: Mapping[str, Any], model: nn.Module, is_zero_adapter: bool
) -> None:
    adapter = adapter_fingerprint(model)
    if is_zero_adapter and adapter is None:
        raise CalibrationError(
            f"{str(folder)!r} is a simulation of a zero adapter. Give it a model with an active "
            "adapter of that shape"
        )
    found = {"base": fingerprint(model), "adapter": None if is_zero_adapter else adapter}
    for what, fingerprint_of_model in found.items():
        saved = record[f"{what}_fingerprint"]
        if fingerprint_of_model != saved:
            raise CalibrationError(
                f"{str(folder)!r} is a simulation of the {what} with fingerprint "
                f"{saved or '(none)'}, but this model's is {fingerprint_of_model or '(none)'}. "
                "Give it the model it was made from, or calibrate again"
            )


def _template_from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_template_from_json(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if SLOT in value:
        return tensors[value[SLOT]]
    if TUPLE in value:
        return tuple(_template_from_json(inner, tensors) for inner in value[TUPLE])
    return {key: _template_from_json(inner, tensors) for key, inner in value.items()}
