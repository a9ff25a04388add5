"""Step 3: encodings of activations and adapters; the stages are listed in `plan/plan.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwlora.adapter.adapter_folder import save_adapter
from qwlora.analysis.quantization_costs import encodings_summary
from qwlora.analysis.token_scores import perplexity
from qwlora.export.npu.use_case_adapters import peft_names, share_unaffected
from qwlora.export.target import NONE, members
from qwlora.pipeline.plan.plan import ADAPTER, BASE_SIMULATION, CASES, SHARED, ZERO, Stage
from qwlora.pipeline.running.loaded_models import JobContext
from qwlora.simulation.adapter_simulations import BASE, apply_shared_encodings, simulate_adapters
from qwlora.simulation.saved_simulation import load_activations, load_encodings, save_encodings
from qwlora.simulation.simulation import Simulation


def run_base(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Calibrate the base without an adapter."""
    simulation = context.simulate(context.base())
    context.check_rules(simulation.placement)
    report = context.calibrate(simulation)
    simulation.save(scratch)
    counts = {"encodings": len(simulation.encodings), "calibration_tokens": report.tokens}
    return {"base_simulation": counts}


def run(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Calibrate one adapter, the encodings that adapters share, the zero adapter or use cases."""
    if stage.adapter is not None:
        return _calibrate_adapter(context, stage.adapter, scratch)
    others = {CASES: _calibrate_use_cases, ZERO: _calibrate_zero_adapter}
    return others.get(stage.name, _calibrate_shared)(context, scratch)


def _calibrate_adapter(context: JobContext, name: str, scratch: Path) -> dict[str, Any]:
    simulation = context.new_simulation(name)
    report = context.calibrate(simulation, name)
    measured: dict[str, Any] = {
        "encodings": len(simulation.encodings),
        "calibration_tokens": report.tokens,
        "constants": list(report.constants),
        "unseen": list(report.unseen),
    }
    if context.recipe.simulation.base_activations != "all":
        measured["perplexity_with_own_encodings"] = perplexity(
            simulation.logits,
            context.text(name).evaluation,
            "perplexity, own encodings",
            context.track,
        )
    _apply_shared(context, simulation)
    measured |= encodings_summary(simulation)
    simulation.save(scratch)
    save_adapter(simulation.origin.model, scratch / ADAPTER, context.base_fingerprint)
    return {"simulation": {name: measured}}


def _apply_shared(context: JobContext, simulation: Simulation) -> None:
    """Replace encodings of one adapter by those that all share, if they share any."""
    shares = context.recipe.simulation.base_activations
    if shares != "all":
        apply_shared_encodings(simulation, load_encodings(context.path / SHARED), shares)


def _calibrate_shared(context: JobContext, scratch: Path) -> dict[str, Any]:
    """Calibrate the shared encodings, on the values of every adapter and of the base alone."""
    names = [adapter.name for adapter in context.recipe.adapters]
    shares = context.recipe.simulation.base_activations
    model = context.adapted(*names)
    with context.step("capturing the graph"):
        simulations = simulate_adapters(model, context.example_inputs, context.schemes, shares)
    context.check_rules(*(simulation.placement for simulation in simulations.values()))
    simulations.observe(**context.calibration(*names))
    simulations.freeze(allow_unseen=context.allow_unseen)
    save_encodings(simulations.shared, scratch)
    return {
        "sharing": {
            "base_activations": shares,
            "encodings": len(simulations.shared),
            "captures": simulations.captures,
        }
    }


def _calibrate_zero_adapter(context: JobContext, scratch: Path) -> dict[str, Any]:
    """Calibrate the zero adapter on the text of the base."""
    simulation = context.new_zero_adapter()
    if context.recipe.workflow == "qwa-lora":
        simulation.fix_encodings(load_activations(context.path / BASE_SIMULATION))
    context.calibrate(simulation)
    _apply_shared(context, simulation)
    simulation.save(scratch)
    return {"zero_adapter": {"encodings": len(simulation.encodings)}}


def _calibrate_use_cases(context: JobContext, scratch: Path) -> dict[str, Any]:
    """Calibrate every use case on the texts of its adapters, and the zero adapter on all texts."""
    cases, simulations = context.recipe.use_cases(), context.new_use_cases()
    texts = {name: members(case) for case, name in peft_names(cases).items() if case != NONE}
    texts[BASE] = [adapter.name for adapter in context.recipe.adapters]
    batches = {name: context.calibration(*adapters)["batches"] for name, adapters in texts.items()}
    tokens = context.recipe.simulation.calibration_tokens
    simulations.observe(batches, context.track, tokens)
    simulations.freeze(allow_unseen=context.allow_unseen)
    share_unaffected(simulations)
    for name, simulation in simulations.items():
        simulation.save(scratch / name)
    return {"use_cases": {case: {"adapters": members(case)} for case in cases}}
