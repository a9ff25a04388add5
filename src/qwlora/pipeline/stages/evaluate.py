"""`evaluate/MODEL` measures a model on its held-out text, `evaluate/MODEL/on/TEXT` on another."""

from __future__ import annotations

from typing import Any

from qwlora.pipeline.stage import Planner, labels_of, revisions
from qwlora.recipe import Adapter
from qwlora.recipe.implied import REFERENCE, compared_with, is_compared


def add(plan: Planner, kind: str, *needs: str, adapter: Adapter | None = None) -> None:
    """Add the stages of one model: `float`, `base`, `imported`, `reference`, `adapted` or
    `simulated`."""
    recipe, name = plan.recipe, None if adapter is None else adapter.name
    own = recipe.base_text() if adapter is None else recipe.data_of(adapter)
    inputs = plan.model if kind in ("float", "imported", REFERENCE) else {}
    inputs |= revisions("token_scores")
    if kind == "imported" and adapter is not None:
        inputs["continue_from"] = plan.sources.adapter(str(adapter.continue_from))
    stage = f"evaluate/{kind}" if name is None else f"evaluate/{kind}/{name}"
    labels = labels_of(adapter) if adapter else {}
    if own is not None:
        reference = compared_with(recipe, kind, adapter)
        against = [reference] if reference else []
        read = {**inputs, "text": plan.measured(own)}
        read |= {"reference": recipe.reference} if reference else {}
        more: dict[str, Any] = {"adapter": name, "labels": labels, "kind": f"evaluate/{kind}"}
        plan.add(stage, read, *needs, *against, **more)
    kinds = {"float", "base", *(["adapted"] if recipe.evaluate == "all" else [])}
    texts = recipe.texts() if kind in kinds else {}
    for text, data in texts.items() if len(texts) > 1 else ():
        if data != own:
            more = {"adapter": name, "text": text}
            read = {**inputs, "text": plan.measured(data), "kl": is_compared(kind, text)}
            plan.add(f"{stage}/on/{text}", read, *needs, kind=f"evaluate/{kind}/on", **more)
