"""Simulations that no single adapter has: calibrated once, captured again by every later stage.

simulation/_base              of a zero adapter on every layer that an adapter of the job changes:
                              what a runtime that can switch adapters computes without one
simulation/_use_cases/CASE    of a use case; "base" is the zero adapter

Each folder holds encodings, see `saved_simulation.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwlora.adapter.attach import LoraShape, attach, check_existing, check_shape
from qwlora.export.canonical_adapter import read_canonical
from qwlora.export.npu.use_case_adapters import (
    peft_names,
    share_unaffected,
    use_case_model,
)
from qwlora.export.target import NONE, members
from qwlora.pipeline.job.job_paths import ADAPTER, BASE_SIMULATION, SHARED, USE_CASES, ZERO_ADAPTER
from qwlora.simulation.adapter_simulations import (
    BASE,
    AdapterSimulations,
    apply_shared_encodings,
    simulate_adapters,
)
from qwlora.simulation.load_simulation import restore
from qwlora.simulation.saved_simulation import load_activations, load_encodings
from qwlora.simulation.simulation import Simulation, simulate
from qwlora.system.parameter_names import canonical_name, is_factor_name

if TYPE_CHECKING:
    from qwlora.pipeline.running.loaded_models import JobContext
    from qwlora.recipe import Adapter


def calibrate_zero_adapter(context: JobContext, scratch: Path) -> dict[str, Any]:
    """Calibrate the zero adapter on the text of the base."""
    simulation, section = _zero_simulation(context), context.recipe.simulation
    if context.recipe.workflow == "qwa-lora":
        simulation.fix_encodings(load_activations(context.path / BASE_SIMULATION))
    context.calibrate(simulation)
    if section.base_activations != "all":
        shared = load_encodings(context.path / SHARED)
        apply_shared_encodings(simulation, shared, section.base_activations)
    simulation.save(scratch)
    context.zero_adapter = simulation
    return {"zero_adapter": {"encodings": len(simulation.encodings)}}


def zero_adapter_simulation(context: JobContext) -> Simulation:
    """The calibrated simulation; the context keeps it until the next simulation is captured."""
    if context.zero_adapter is None:
        simulation, folder = _zero_simulation(context), context.path / ZERO_ADAPTER
        restore(simulation, folder)
        context.zero_adapter = simulation
    return context.zero_adapter


def _zero_simulation(context: JobContext) -> Simulation:
    """Of the shape of the first adapter if that one changes all layers."""
    first, *others = context.recipe.adapters
    layers = _layers(context, first)
    union = layers.union(*(_layers(context, adapter) for adapter in others))
    if union == layers:
        model = context.untrained(first).eval()
    else:
        shape = LoraShape(first.rank, first.alpha, target_modules=sorted(union))
        model = attach(context.base(), shape, context.recipe.seed).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_factor_name(canonical_name(name)):
                parameter.zero_()
    with context.step("capturing the graph"):
        return simulate(model, context.example_inputs, context.schemes)


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


def calibrate_use_cases(context: JobContext, scratch: Path) -> dict[str, Any]:
    """Calibrate every use case on the texts of its adapters, and the zero adapter on all texts."""
    cases, section = context.recipe.use_cases(), context.recipe.simulation
    simulations = _case_simulations(context)
    names = peft_names(cases)
    batches = {
        names[case]: context.calibration(*members(case))["batches"]
        for case in cases
        if case != NONE
    }
    everyone = [adapter.name for adapter in context.recipe.adapters]
    batches[BASE] = context.calibration(*everyone)["batches"]
    simulations.observe(batches, context.track, section.calibration_tokens)
    simulations.freeze(allow_unseen=context.allow_unseen)
    share_unaffected(simulations)
    for name, simulation in simulations.items():
        simulation.save(scratch / name)
    return {"use_cases": {case: {"adapters": members(case)} for case in cases}}


def use_case_simulations(context: JobContext) -> dict[str, Simulation]:
    """The calibrated simulation of every use case by name, and of the zero adapter as "base"; the
    context keeps them."""
    if context.use_cases is None:
        simulations, names = _case_simulations(context), peft_names(context.recipe.use_cases())
        for name, simulation in simulations.items():
            folder = context.path / USE_CASES / name
            restore(simulation, folder)
        context.use_cases = {case: simulations[name] for case, name in names.items()}
        context.use_cases[BASE] = simulations[BASE]
    return context.use_cases


def _case_simulations(context: JobContext) -> AdapterSimulations:
    recipe = context.recipe
    adapters = {
        name: read_canonical(context.path / "simulation" / name / ADAPTER)
        for case in recipe.use_cases()
        for name in members(case)
    }
    model = use_case_model(context.base(), adapters, recipe.use_cases())
    return simulate_adapters(
        model, context.example_inputs, context.schemes, recipe.simulation.base_activations
    )
