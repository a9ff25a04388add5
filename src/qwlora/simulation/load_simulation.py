"""Read what `saved_simulation.py` wrote: capture the graph again and restore its encodings.

The logits of a loaded simulation are those of the saved one, bit for bit.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qwlora.adapter.active_adapters import active_adapter
from qwlora.errors import CalibrationError
from qwlora.nn.fingerprint import adapter_fingerprint, fingerprint
from qwlora.simulation.adapter_simulations import BASE, simulate_adapters
from qwlora.simulation.fake_quantizer import device_of
from qwlora.simulation.saved_simulation import (
    check_files,
    load_encodings,
    read_inputs,
    read_record,
)
from qwlora.simulation.simulation import Simulation, simulate
from qwlora.system.parameter_names import is_adapter_name


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
    adapter = adapter_fingerprint(model)
    is_zero_adapter = record.adapter_fingerprint is None and any(
        is_adapter_name(name) for name in record.encodings
    )
    if is_zero_adapter and adapter is None:
        raise CalibrationError(
            f"{str(folder)!r} is a simulation of a zero adapter. Give it a model with an active "
            "adapter of that shape"
        )
    for what, digest, saved in (
        ("base", fingerprint(model), record.base_fingerprint),
        ("adapter", None if is_zero_adapter else adapter, record.adapter_fingerprint),
    ):
        if digest != saved:
            raise CalibrationError(
                f"{str(folder)!r} is a simulation of the {what} with fingerprint "
                f"{saved or '(none)'}, but this model's is {digest or '(none)'}. "
                "Give it the model it was made from, or calibrate again"
            )
    inputs = read_inputs(folder, record, device_of(model))
    if is_zero_adapter:
        names = [active_adapter(model)]
        simulation = simulate_adapters(model, inputs, record.schemes, adapters=names)[BASE]
    else:
        simulation = simulate(model, inputs, record.schemes)
    restore(simulation, folder)
    return simulation


def restore(simulation: Simulation, folder: Path, adapter_weights: bool = True) -> None:
    """Give an uncalibrated simulation of the same base and adapter the encodings in `folder`.

    Args:
        adapter_weights: also those of the adapter's weights. Where adapters share them, they do
            not follow from this adapter's own values.

    Raises:
        CalibrationError: the folder does not hold them, or they belong to other values.
    """
    encodings = load_encodings(folder)
    if adapter_weights:
        simulation.set_adapter_encodings(encodings)
    dropped = read_record(folder).dropped
    simulation.restore({**simulation.base_encodings, **encodings}, dropped)
