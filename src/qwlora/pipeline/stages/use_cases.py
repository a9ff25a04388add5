"""The simulations of a job's use cases: calibrated once, captured again by every later stage.

simulation/_use_cases/CASE    encodings, see `saved_simulation.py`; "base" is the zero adapter
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.export.canonical_adapter import read_canonical
from qwlora.export.npu.use_case_adapters import (
    NONE,
    members,
    peft_names,
    share_unaffected,
    use_case_model,
)
from qwlora.pipeline.job.job_paths import ADAPTER, USE_CASES
from qwlora.simulation.adapter_simulations import BASE, AdapterSimulations, simulate_adapters
from qwlora.simulation.load_simulation import restore
from qwlora.simulation.saved_simulation import load_encodings
from qwlora.simulation.simulation import Simulation

if TYPE_CHECKING:
    from qwlora.pipeline.running.loaded_models import JobContext


def calibrate_use_cases(context: JobContext, scratch: Path) -> dict[str, Any]:
    """Calibrate every use case on the texts of its adapters, and the zero adapter on all texts."""
    cases, section = context.recipe.use_cases(), context.recipe.simulation
    simulations = _simulations(context)
    names = peft_names(cases)
    batches = {
        names[case]: context.calibration_of(members(case))["batches"]
        for case in cases
        if case != NONE
    }
    everyone = [adapter.name for adapter in context.recipe.adapters]
    batches[BASE] = context.calibration_of(everyone)["batches"]
    simulations.observe(batches, context.track, section.calibration_tokens)
    simulations.freeze(allow_unseen=section.unseen == "float")
    share_unaffected(simulations)
    for name, simulation in simulations.items():
        simulation.save(scratch / name)
    return {"use_cases": {case: {"adapters": members(case)} for case in cases}}


def use_case_simulations(context: JobContext) -> dict[str, Simulation]:
    """The calibrated simulation of every use case by name, and of the zero adapter as "base"; the
    context keeps them."""
    if context.use_cases is None:
        context.use_cases = _load(context)
    return context.use_cases


def _load(context: JobContext) -> dict[str, Simulation]:
    simulations, names = _simulations(context), peft_names(context.recipe.use_cases())
    for name, simulation in simulations.items():
        folder = context.path / USE_CASES / name
        # shared encodings of adapter weights are not those of their own values
        simulation.set_adapter_encodings(load_encodings(folder))
        restore(simulation, folder)
    return {case: simulations[name] for case, name in names.items()} | {BASE: simulations[BASE]}


def _simulations(context: JobContext) -> AdapterSimulations:
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
