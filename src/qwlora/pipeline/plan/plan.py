"""The plan of a job: its stages, in order.

Imports no torch, so that a run in which nothing changed ends at once.
"""

from __future__ import annotations

from qwlora.export.registry import TARGETS
from qwlora.formats.model_source import fetch
from qwlora.pipeline.job.digests import Digests
from qwlora.pipeline.plan.stage import JobTexts, PlanBuilder, Stage
from qwlora.pipeline.stages import (
    calibrate_stage,
    evaluate_stage,
    export_stage,
    quantize_stage,
    train_stage,
    verify_stage,
)
from qwlora.recipe import Adapter, Recipe
from qwlora.system.compute_precision import auto_compute, training_device

TUNING_DEVICE = "cpu"  # quantization runs on the CPU


def make_plan(recipe: Recipe, texts: JobTexts, digests: Digests | None = None) -> list[Stage]:
    """All stages in the order of a full run.

    All stages of one adapter's simulation follow each other, while it is in memory.

    Args:
        digests: digests of the model's files and of adapters to continue from. Pass those of the
            job, so that unchanged files are not read again.
    """
    plan = PlanBuilder(recipe, texts, digests or Digests())
    if has_float_model(recipe):
        evaluate_stage.add(plan, "float")
    quantize_stage.add(plan)
    evaluate_stage.add(plan, "base", ("quantize",))
    targets = {name: TARGETS[name] for name in recipe.export.targets}
    simulated = [name for name, target in targets.items() if target.needs_zero_adapter]
    for name, target in targets.items():
        if target.has_base and not target.is_simulated:
            export_stage.add_base(plan, name)
    calibrate_stage.add_base(plan)
    for adapter in recipe.adapters:
        if is_imported(recipe, adapter) and has_float_model(recipe):
            evaluate_stage.add(plan, "imported", (), adapter.name)
        train_stage.add(plan, adapter)
    calibrate_stage.add_shared(plan)
    if simulated:
        calibrate_stage.add_zero(plan)
    for name in simulated:
        export_stage.add_base(plan, name)
    for adapter in recipe.adapters:
        evaluate_stage.add(plan, "adapted", (f"train/{adapter.name}",), adapter.name)
        calibrate_stage.add(plan, adapter.name)
        evaluate_stage.add(plan, "simulated", (f"calibrate/{adapter.name}",), adapter.name)
        for name, target in targets.items():
            if not target.has_cases:
                export_stage.add(plan, name, adapter.name)
                verify_stage.add(plan, name, adapter.name)
    for name in simulated:  # last, so that a failure leaves nothing of the adapters undone
        verify_stage.add_base(plan, name)
    with_cases = [name for name, target in targets.items() if target.has_cases]
    if with_cases:
        calibrate_stage.add_use_cases(plan)
    for name in with_cases:
        export_stage.add_use_cases(plan, name)
        verify_stage.add_use_cases(plan, name)
    return list(plan.stages.values())


def resolve_compute(recipe: Recipe) -> Recipe:
    """Replace `compute: auto` with the precision it means on this machine.

    Results depend on it, so stage keys and the recipe in the directory hold the actual precision.
    """
    base, graph = recipe.base, recipe.workflow == "qwa-lora"  # the graph computes in float32 only
    if base.tuning.steps and base.tuning.compute == "auto":
        compute = {"compute": auto_compute(TUNING_DEVICE)}
        base = base.model_copy(update={"tuning": base.tuning.model_copy(update=compute)})
    adapters = list(recipe.adapters)
    for i, adapter in enumerate(adapters):
        if adapter.compute == "auto":
            is_fixed = graph or not adapter.steps
            compute = {"compute": "float32" if is_fixed else auto_compute(training_device())}
            adapters[i] = adapter.model_copy(update=compute)
    return recipe.model_copy(update={"base": base, "adapters": adapters})


def is_imported(recipe: Recipe, adapter: Adapter) -> bool:
    """Whether an adapter continues one that was trained elsewhere, perhaps on another base."""
    return (
        adapter.continue_from is not None
        and adapter.unknown_base == "accept"
        and recipe.predecessor(adapter) is None
    )


def has_float_model(recipe: Recipe) -> bool:
    """Whether there is a float model to compare with, or only integers in a quantized format."""
    return fetch(recipe.model.source).holds_floats
