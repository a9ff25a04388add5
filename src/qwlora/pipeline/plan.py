"""Which stages a recipe has, and in which order. Free of torch, so that a run in which nothing changed ends at once."""

from __future__ import annotations

from qwlora.data import Documents
from qwlora.formats.model_source import fetch
from qwlora.pipeline.digests import Digests
from qwlora.pipeline.stage import PlanBuilder, Stage
from qwlora.pipeline.stages import (
    calibrate_base_stage,
    calibrate_stage,
    evaluate_stage,
    export_stage,
    quantize_stage,
    train_stage,
    verify_stage,
)
from qwlora.recipe import Recipe
from qwlora.system.compute_precision import auto_compute, training_device

TUNING_DEVICE = "cpu"  # where bases are made


def make_plan(recipe: Recipe, documents: Documents, digests: Digests | None = None) -> list[Stage]:
    """All stages in the order of a full run. An adapter's simulation is used while it is in memory.

    Args:
        digests: of the model's files and of adapters to continue from; give a job's own, so that
            files that did not change are not read again.
    """
    plan = PlanBuilder(recipe, documents, digests or Digests())
    if has_float_model(recipe):
        evaluate_stage.add(plan, "float")
    quantize_stage.add(plan)
    evaluate_stage.add(plan, "base", ("quantize",))
    calibrate_base_stage.add(plan)
    for adapter in recipe.adapters:
        train_stage.add(plan, adapter)
    calibrate_stage.add_shared(plan)
    for name in (adapter.name for adapter in recipe.adapters):
        evaluate_stage.add(plan, "adapted", (f"train/{name}",), name)
        calibrate_stage.add(plan, name)
        evaluate_stage.add(plan, "simulated", (f"calibrate/{name}",), name)
        for target in recipe.export.targets:
            export_stage.add(plan, target, name)
            verify_stage.add(plan, target, name)
    return plan.stages


def resolve_compute(recipe: Recipe) -> Recipe:
    """`recipe` with `compute: auto` replaced by what it stands for on this machine.

    Results depend on it, so stage keys and the directory's own recipe hold the precision itself.
    """
    base, graph = recipe.base, recipe.workflow == "qwa-lora"  # which computes in float32 alone
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


def has_float_model(recipe: Recipe) -> bool:
    """Whether there is a float model to compare with: not where the files hold only integers that transformers would need another library for."""
    return fetch(recipe.model.source).holds_floats


def dependents(plan: list[Stage], name: str) -> list[str]:
    """Names of the stages that read the result of `name`, or of one that does."""
    found = {name}
    for stage in plan:  # a stage comes after those that it needs
        if found & set(stage.needs):
            found.add(stage.name)
    return [stage.name for stage in plan if stage.name in found - {name}]
