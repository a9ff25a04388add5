"""Step 3: encodings of activations and adapters.

calibrate-base    encodings of the base's activations, in workflow qwa-lora: adapters are then
                  trained through the quantized activations
calibrate         encodings that adapters share, if simulation.base_activations shares any
calibrate/NAME    encodings of one adapter
calibrate/_base         encodings of a zero adapter, for targets that switch simulations
calibrate/_use_cases    encodings of export.use_cases, for targets that hold all of them
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from qwlora.export.target import NONE, members
from qwlora.grid.range_estimator import RangeEstimator
from qwlora.pipeline.plan.stage import (
    ADAPTER,
    BASE_SIMULATION,
    SHARED,
    USE_CASES,
    ZERO_ADAPTER,
    PlanBuilder,
    Stage,
)
from qwlora.quantize.revisions import REVISIONS
from qwlora.recipe import Adapter, Data, Recipe

if TYPE_CHECKING:
    from qwlora.pipeline.running.loaded_models import JobContext
    from qwlora.simulation.simulation import Simulation


NAME = "calibrate"
CASES, ZERO = f"{NAME}/_use_cases", f"{NAME}/_base"
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
_IN_BLOCK = re.compile(r".+\.\d+\..+")


def range_inputs(plan: PlanBuilder, texts: Iterable[Data]) -> list[Any]:
    """Key inputs of activation ranges that are measured on `texts`."""
    section = plan.recipe.simulation
    inputs: list[Any] = [
        section.model_dump(),
        [[plan.texts.key(t), t.calibration_sequences] for t in texts],
    ]
    observers = {section.observer, *(r.observer for r in section.rules if r.observer is not None)}
    if any(RangeEstimator(observer).needs_sample for observer in observers):
        inputs.append(REVISIONS["activation_samples"])
    return inputs


def add_base(plan: PlanBuilder) -> None:
    """Add the stage of the base's own encodings, if the workflow is qwa-lora."""
    if plan.recipe.workflow == "qwa-lora":
        inputs = range_inputs(plan, plan.recipe.base_texts())
        plan.add("calibrate-base", inputs, ("quantize",), artifact=BASE_SIMULATION)


def add_shared(plan: PlanBuilder) -> None:
    """Add the stage of shared encodings, if adapters share any."""
    if _shares(plan):
        trained = tuple(f"train/{adapter.name}" for adapter in plan.recipe.adapters)
        plan.add(NAME, range_inputs(plan, plan.recipe.texts().values()), trained, artifact=SHARED)


def add(plan: PlanBuilder, name: str) -> None:
    """Add the stage of one adapter. If encodings are shared, held-out text is an input, since the
    cost of sharing is measured on it."""
    needs = (f"train/{name}", NAME) if _shares(plan) else (f"train/{name}",)
    data = plan.recipe.data_of(name)
    held_out = plan.held_out(data) if _shares(plan) else None
    inputs = [range_inputs(plan, [data]), held_out]
    plan.add(f"{NAME}/{name}", inputs, needs, name, f"simulation/{name}")


def add_zero(plan: PlanBuilder) -> None:
    """Add the stage of the zero adapter. It depends on the shape of the first adapter, and on which
    layers have one: another adapter of the same layers changes nothing. Of an adapter from
    elsewhere the recipe does not say the layers, but its files may."""
    recipe = plan.recipe
    first, *others = recipe.adapters
    foreign = [a for a in recipe.adapters if a.continue_from and recipe.predecessor(a) is None]
    counted = [first, *(a for a in others if a not in foreign or not _is_covered(recipe, a))]
    shape = first.model_dump(include={"rank", "rank_pattern"})
    layers = {a.model_dump_json(include={"target_modules", "layers"}) for a in counted}
    needs = [f"train/{a.name}" for a in counted if a in foreign]
    if recipe.workflow == "qwa-lora":
        needs.append("calibrate-base")
    if _shares(plan):
        needs.append(NAME)
    inputs = [range_inputs(plan, recipe.base_texts()), [shape, *sorted(layers)], recipe.seed]
    plan.add(ZERO, inputs, ("quantize", *needs), artifact=ZERO_ADAPTER)


def _is_covered(recipe: Recipe, adapter: Adapter) -> bool:
    """Whether new adapters of `recipe` change all layers of an adapter that continues a folder, by
    the target_modules that PEFT reads: `all-linear` is every linear layer inside a numbered block,
    names are the ends of paths. Of a regular expression it is not known: it may take for ever.

    False if the adapter is on the hub, or its files cannot be read or hold something else than
    factors of linear layers.
    """
    folder = Path(str(adapter.continue_from))
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", "np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        factors = [len(s) == 2 and _FACTOR.fullmatch(name) for name, s in shapes.items()]
        layers = {match[1] for match in factors if match}
        if not layers or not all(factors) or config.get("target_parameters"):
            return False
    except (OSError, ValueError, AttributeError, RecursionError, SafetensorError):
        return False

    def targets(modules: str | list[str], layer: str) -> bool:
        if isinstance(modules, list):
            return any(f".{layer}".endswith(f".{name}") for name in modules)
        return modules.lower() == "all-linear" and _IN_BLOCK.fullmatch(layer) is not None

    new = [a for a in recipe.adapters if a.continue_from is None and a.layers is None]
    return any(all(targets(a.target_modules, layer) for layer in layers) for a in new)


def add_use_cases(plan: PlanBuilder) -> None:
    """Add the stage of the use cases, once."""
    cases, texts = plan.recipe.use_cases(), plan.recipe.texts().values()
    needs = tuple(f"{NAME}/{adapter.name}" for adapter in plan.recipe.adapters)
    plan.add(CASES, [cases, range_inputs(plan, texts)], needs, artifact=USE_CASES)


def _shares(plan: PlanBuilder) -> bool:
    return plan.recipe.simulation.base_activations != "all"


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
    other = {CASES: _calibrate_use_cases, ZERO: _calibrate_zero_adapter, NAME: _calibrate_shared}
    return other[stage.name](context, scratch)


def _calibrate_adapter(context: JobContext, name: str, scratch: Path) -> dict[str, Any]:
    from qwlora.adapter.adapter_folder import save_adapter
    from qwlora.analysis.encodings_summary import encodings_summary
    from qwlora.analysis.token_scores import perplexity

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
    from qwlora.simulation.adapter_simulations import apply_shared_encodings
    from qwlora.simulation.saved_simulation import load_encodings

    shares = context.recipe.simulation.base_activations
    if shares != "all":
        apply_shared_encodings(simulation, load_encodings(context.path / SHARED), shares)


def _calibrate_shared(context: JobContext, scratch: Path) -> dict[str, Any]:
    """Calibrate the shared encodings, on the values of every adapter and of the base alone."""
    from qwlora.simulation.adapter_simulations import simulate_adapters
    from qwlora.simulation.saved_simulation import save_encodings

    names = [adapter.name for adapter in context.recipe.adapters]
    shares = context.recipe.simulation.base_activations
    model = context.with_adapters(*names)
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
    from qwlora.simulation.saved_simulation import load_activations

    simulation = context.new_zero_adapter()
    if context.recipe.workflow == "qwa-lora":
        simulation.fix_encodings(load_activations(context.path / BASE_SIMULATION))
    context.calibrate(simulation)
    _apply_shared(context, simulation)
    simulation.save(scratch)
    return {"zero_adapter": {"encodings": len(simulation.encodings)}}


def _calibrate_use_cases(context: JobContext, scratch: Path) -> dict[str, Any]:
    """Calibrate every use case on the texts of its adapters, and the zero adapter on all texts."""
    from qwlora.export.npu.use_case_adapters import peft_names, share_unaffected
    from qwlora.simulation.adapter_simulations import BASE

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
