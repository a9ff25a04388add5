"""A captured model with simulated integer arithmetic.

    simulation = simulate(model, example_inputs)      # capture, place quantizers, quantize weights
    simulation.calibrate(batches)                     # one float pass sets the activation ranges
    simulation(input_ids=ids, attention_mask=mask)    # what integer hardware computes

The graph computes in float32 for bfloat16 and float16 models too (`graph/half_precision.py`).
`load_simulation.py` reads what `Simulation.save` writes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qwlora.errors import CaptureError, QwloraWarning
from qwlora.graph.capture import capture
from qwlora.graph.quantized_graph import Kind
from qwlora.nn.frozen import assert_frozen, packed_layers
from qwlora.nn.unwrap import unwrapped
from qwlora.simulation.save_simulation import save_simulation
from qwlora.simulation.simulated_graph import Origin, SimulatedGraph
from qwlora.simulation.simulated_model import as_model
from qwlora.simulation.simulation_schemes import SimulationSchemes


class Simulation(SimulatedGraph):
    """A `SimulatedGraph` that can be saved, and used like the transformers model it came from."""

    def model(self) -> PreTrainedModel:
        """The simulation with the interface of its transformers model; see `as_model`.

        Raises:
            CalibrationError: an activation has no encoding yet.
            CaptureError: see `as_model`.
        """
        self._refuse_uncalibrated()
        return as_model(self)

    def __repr__(self) -> str:
        found = Counter(mark.kind for mark in self.marks)
        words = {
            Kind.BASE: "base weights",
            Kind.ADAPTER: "adapter weights",
            Kind.PARAMETER: "other parameters",
            Kind.ACTIVATION: "activations",
        }
        counts = ", ".join(f"{found[kind]:,} {word}" for kind, word in words.items())
        missing = sum(quantizer.encoding is None for quantizer in self.quantizers.values())
        state = f"{missing:,} not calibrated" if missing else "calibrated"
        return f"Simulation of {type(self.origin.model).__name__}: {counts}; {state}"

    def save(self, folder: str | Path) -> None:
        """Write the simulation to `folder`; see `save_simulation`."""
        save_simulation(self, folder)


def simulate(
    model: nn.Module, example_inputs: Mapping[str, Any], schemes: SimulationSchemes | None = None
) -> Simulation:
    """Capture `model` (a frozen base, with or without an adapter) and place quantizers.

    Args:
        example_inputs: the model's keyword arguments, with at least two tokens; see `capture`.
        schemes: default: `SimulationSchemes()`.

    Raises:
        CaptureError: see `capture`; or the graph uses no packed layer although the model has some.
        CalibrationError: a weight is not finite, or see `place`.
    """
    model = unwrapped(model)
    schemes = schemes or SimulationSchemes()
    packed = packed_layers(model)
    if packed:
        assert_frozen(model)
    elif any(parameter.ndim > 1 for parameter in model.parameters()):
        warnings.warn(
            f"{type(model).__name__} has no packed layer, so the simulation has no base encodings: "
            f"all weights get the grid of SimulationSchemes.parameters ({schemes.parameters}). "
            "To simulate integer weights, call qwlora.quantize_ first",
            QwloraWarning,
            stacklevel=2,
        )
    captured = capture(model, example_inputs)
    simulation = Simulation(captured, Origin.of(model, example_inputs, schemes))
    if packed and not simulation.base_encodings:
        raise CaptureError(
            f"the captured graph uses none of the {len(packed)} packed layers of "
            f"{type(model).__name__}, {next(iter(packed))} first: something computes other weights "
            "in their place. Remove patched forwards, or pass inputs that reach these layers"
        )
    return simulation
