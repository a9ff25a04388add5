"""`evaluate/MODEL` measures a model on its held-out text, `evaluate/MODEL/on/TEXT` on another."""

from __future__ import annotations

from typing import Any

from qwlora.pipeline.stage import Planner, labels_of, revisions
from qwlora.recipe import Adapter
from qwlora.recipe.implied import REFERENCE, compared_with, is_compared


def add(plan: Planner, kind: str, *needs: str, adapter: Adapter | None = None) -> None:
    """The stages of a model: `float`, `base`, `imported`, `reference`, `adapted` or `simulated`."""
    recipe, name = plan.recipe, None if adapter is None else adapter.name
    own_text = recipe.base_text() if adapter is None else recipe.data_of(adapter)
    inputs = plan.model if kind in ("float", "imported", REFERENCE) else {}
    inputs |= revisions("token_scores")
    if kind == "imported" and adapter is not None:
        inputs["continue_from"] = plan.sources.adapter(str(adapter.continue_from))
    stage = f"evaluate/{kind}" if name is None else f"evaluate/{kind}/{name}"
    labels = labels_of(adapter) if adapter else {}
    if own_text is not None:
        reference = compared_with(recipe, kind, adapter)
        against = [reference] if reference else []
        measured = {**inputs, "text": plan.measured(own_text)}
        measured |= {"reference": recipe.reference} if reference else {}
        more: dict[str, Any] = {"adapter": name, "labels": labels, "kind": f"evaluate/{kind}"}
        plan.add(stage, measured, *needs, *against, **more)
    kinds = {"float", "base", *(["adapted"] if recipe.evaluate == "all" else [])}
    texts = recipe.texts() if kind in kinds else {}
    for text, data in texts.items() if len(texts) > 1 else ():
        if data != own_text:
            more = {"adapter": name, "text": text}
            measured = {**inputs, "text": plan.measured(data), "kl": is_compared(kind, text)}
            plan.add(f"{stage}/on/{text}", measured, *needs, kind=f"evaluate/{kind}/on", **more)
