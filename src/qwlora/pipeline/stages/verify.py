"""`verify/TARGET/NAME` runs exported files; `verify/TARGET` those of the zero adapter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qwlora.pipeline.stage import Planner
from qwlora.recipe import Data
from qwlora.targets.target import PROOF


def add(plan: Planner, target: str, name: str, texts: Iterable[Data]) -> None:
    """Add the check of an adapter or use case. Whether its runtime is installed does not
    matter: a proof is of files, and one that was not run is no proof."""
    known, recipe = plan.targets[target], plan.recipe
    inputs: dict[str, Any] = {"verify": recipe.verify.model_dump(mode="json")}
    inputs["texts"] = [plan.text(text) for text in texts]
    inputs |= plan.shipped() if known.has_proof else {}
    inputs |= {"use_case": name} if known.has_cases else {}
    named = {"case" if known.has_cases else "adapter": name}
    artifact = f"export/{target}/{PROOF}/{name}" if known.has_proof else None
    more: dict[str, Any] = {**named, "artifact": artifact}
    more |= {"missing": known.missing} if known.has_proof else {}
    needs, kind = known.stages(target, name), f"verify/{target}/adapter"
    plan.add(f"verify/{target}/{name}", inputs, *needs, kind=kind, **more)


def add_zero_adapter(plan: Planner, target: str) -> None:
    """The base as the zero adapter."""
    text = plan.text(plan.recipe.data_of(plan.recipe.adapters[0]))
    inputs = {"verify": plan.recipe.verify.model_dump(mode="json"), "texts": [text]}
    plan.add(f"verify/{target}", inputs, f"export/{target}")
