"""`train/NAME` trains an adapter on the base, `train/NAME/float` the same on the float model."""

from __future__ import annotations

from typing import Any

from qwlora.pipeline.stage import ACTIVATIONS, FLOAT_ADAPTERS, SAMPLE, Planner, labels_of, revisions
from qwlora.recipe import Adapter
from qwlora.recipe.implied import recovers_on_base_text, reference_stage, without_recovery

# Settings of an adapter that do not change the result. What it continues and its text are inputs of
# their own, by digest.
_WITHOUT_EFFECT = {
    *("name", "data", "continue_from", "unknown_base"),
    *("checkpoint_steps", "divergence", "report_to"),
}


def _without_effect(adapter: Adapter) -> set[str]:
    return _WITHOUT_EFFECT | {"epochs" if adapter.epochs is None else "steps"}


def _learned(plan: Planner, adapter: Adapter, start: Adapter) -> dict[str, Any]:
    data, is_new = plan.recipe.data_of(adapter), plan.recipe.predecessor(start) is None
    text = plan.measured(data) if adapter.evaluation_steps else plan.text(data)
    inputs = {"text": text, "seed": plan.recipe.seed, "workflow": plan.recipe.workflow}
    if start.continue_from is not None and is_new:
        inputs["continue_from"] = plan.sources.adapter(start.continue_from)
    return inputs


def add(plan: Planner, adapter: Adapter) -> None:
    """Train an adapter on the base."""
    recipe, name = plan.recipe, adapter.name
    first, has_init = recipe.predecessor(adapter), adapter.init != "zero"
    settings = adapter.model_dump(mode="json", exclude=_without_effect(adapter))
    settings["init_share"] = recipe.init_share(adapter) if has_init else None
    inputs = {"adapter": settings, **_learned(plan, adapter, adapter)}
    observed = ["layer_statistics"] if adapter.init == "qera" else []
    inputs |= revisions("initialize_adapter", *observed) if has_init else {}
    needs = ["quantize", *([f"train/{first.name}"] if first else [])]
    needs += [ACTIVATIONS] if recipe.workflow == "qwa-lora" else []
    if recovers_on_base_text(recipe, adapter):
        inputs |= plan.calibration()
        needs += [SAMPLE] * (SAMPLE in plan.stages)
    more: dict[str, Any] = {"adapter": name, "labels": labels_of(adapter)}
    more["artifact"] = f"adapters/{name}"
    plan.add(f"train/{name}", inputs, *needs, kind="train", **more)


def add_reference(plan: Planner, adapter: Adapter, stage: str) -> None:
    """Train the same adapter on the float model."""
    # It does not need the base, so bases of other integers are compared with the same adapter.
    recipe, start = plan.recipe, without_recovery(plan.recipe, adapter)
    without = {"init", "init_share"}
    settings = [
        a.model_dump(mode="json", exclude=without | _without_effect(a)) for a in (adapter, start)
    ]
    inputs = {**plan.model, "adapter": settings[0], **_learned(plan, adapter, start)}
    inputs["start"] = settings[1]
    first, name = recipe.predecessor(start), adapter.name
    before = reference_stage(recipe, first) if first else None
    more = {"artifact": f"{FLOAT_ADAPTERS}/{name}", "labels": labels_of(adapter)}
    needs = [before] if before else []
    plan.add(stage, inputs, *needs, kind="train/float", adapter=name, **more)
