"""The simulation of a zero adapter on every layer that an adapter of the job changes: what a
runtime that can switch adapters computes without one.

simulation/_base    its encodings, see `saved_simulation.py`
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwlora.adapter.attach import LoraShape, attach, check_existing, check_shape
from qwlora.parameter_names import canonical_name, is_factor_name
from qwlora.pipeline.job.job_paths import BASE_SIMULATION, SHARED, ZERO_ADAPTER
from qwlora.simulation.adapter_simulations import apply_shared_encodings
from qwlora.simulation.load_simulation import restore
from qwlora.simulation.saved_simulation import load_activations, load_encodings
from qwlora.simulation.simulation import Simulation, simulate

if TYPE_CHECKING:
    from peft import PeftModel

    from qwlora.pipeline.running.loaded_models import JobContext
    from qwlora.recipe import Adapter


def calibrate_zero_adapter(context: JobContext, scratch: Path) -> dict[str, Any]:
    """Calibrate the zero adapter on the text of the base."""
    simulation, section = _simulation(context), context.recipe.simulation
    if context.recipe.workflow == "qwa-lora":
        simulation.fix_encodings(load_activations(context.path / BASE_SIMULATION))
    simulation.calibrate(**context.base_calibration(), allow_unseen=section.unseen == "float")
    if section.base_activations != "all":
        shared = load_encodings(context.path / SHARED)
        apply_shared_encodings(simulation, shared, section.base_activations)
    simulation.save(scratch)
    context.zero_adapter = simulation
    return {"zero_adapter": {"encodings": len(simulation.encodings)}}


def zero_adapter_simulation(context: JobContext) -> Simulation:
    """The calibrated simulation; the context keeps it until the next simulation is captured."""
    if context.zero_adapter is None:
        simulation, folder = _simulation(context), context.path / ZERO_ADAPTER
        # shared encodings of adapter weights are not those of zeros
        simulation.set_adapter_encodings(load_encodings(folder))
        restore(simulation, folder)
        context.zero_adapter = simulation
    return context.zero_adapter


def _simulation(context: JobContext) -> Simulation:
    model = _model(context).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_factor_name(canonical_name(name)):
                parameter.zero_()
    with context.step("capturing the graph"):
        return simulate(model, context.example_inputs, context.schemes)


def _model(context: JobContext) -> PeftModel:
    """The base with an adapter on every such layer, of the shape of the first adapter if that one
    changes all of them."""
    first, *others = context.recipe.adapters
    layers = _layers(context, first)
    union = layers.union(*(_layers(context, adapter) for adapter in others))
    if union == layers:
        return context.untrained(first)
    shape = LoraShape(first.rank, first.alpha, target_modules=sorted(union))
    return attach(context.base(), shape, context.recipe.seed)


def _layers(context: JobContext, adapter: Adapter) -> set[str]:
    """Paths of the layers that an adapter changes."""
    while (predecessor := context.recipe.predecessor(adapter)) is not None:
        adapter = predecessor
    skeleton = context.skeleton()
    shapes = (
        check_shape(skeleton, adapter.lora_shape())
        if adapter.continue_from is None
        else check_existing(adapter.continue_from, adapter.unknown_base, skeleton)
    )
    return {canonical_name(name).partition(".lora_")[0] for name in shapes if ".lora_" in name}
