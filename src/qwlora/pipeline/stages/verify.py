"""`verify/TARGET/NAME` runs exported files; `verify/TARGET` those of the zero adapter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qwlora.pipeline.stage import Planner
from qwlora.recipe import Data
from qwlora.targets.target import PROOF


def add(plan: Planner, target: str, name: str, texts: Iterable[Data]) -> None:
    """The check of an adapter or use case."""
    # Whether the runtime is installed is no input: a proof is of files, and another machine that
    # lacks it keeps the proof.
    known, recipe = plan.targets[target], plan.recipe
    inputs: dict[str, Any] = {"verify": recipe.verify.model_dump(mode="json")}
    inputs["texts"] = [plan.text(text) for text in texts]
    inputs |= plan.shipped() if known.has_proof else {}
    inputs |= {"use_case": name} if known.has_cases else {}
    more: dict[str, Any] = {"case" if known.has_cases else "adapter": name}
    if known.has_proof:
        more |= {"artifact": f"export/{target}/{PROOF}/{name}", "missing": known.missing}
    needs, kind = known.stages(target, name), f"verify/{target}/adapter"
    plan.add(f"verify/{target}/{name}", inputs, *needs, kind=kind, **more)


def add_zero_adapter(plan: Planner, target: str) -> None:
    """The base as the zero adapter."""
    text = plan.text(plan.recipe.data_of(plan.recipe.adapters[0]))
    inputs = {"verify": plan.recipe.verify.model_dump(mode="json"), "texts": [text]}
    plan.add(f"verify/{target}", inputs, f"export/{target}")
