"""Stages `verify/TARGET/NAME`, step 5: run exported files and compare them with the simulation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.export.target import TARGETS
from qwlora.pipeline.stage import PlanBuilder, Stage

if TYPE_CHECKING:
    from qwlora.pipeline.context import JobContext


NAME = "verify"


def add(plan: PlanBuilder, target: str, name: str) -> None:
    """Add the stage of one target and adapter."""
    inputs = [plan.recipe.verify.model_dump(), plan.text(name)]
    plan.add(f"{NAME}/{target}/{name}", inputs, (f"export/{target}/{name}",), name)


def run(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Run the exported files on held-out text and compare the result with the recipe's limits."""
    from qwlora.errors import VerificationError
    from qwlora.export.verify import Limits, verify_language_model

    _, name, *_ = stage.name.split("/")
    adapter, section = str(stage.adapter), context.recipe.verify
    parity = verify_language_model(
        TARGETS[name].open(context.path / "export" / name / adapter),
        context.simulation(adapter),
        context.text(adapter).data.held_out.first(section.sequences),
        section.layer_tokens,
        context.track,
    )
    limits = Limits(
        perplexity_difference=section.perplexity_difference,
        layer_steps=section.layer_steps,
        layer_mean_steps=section.layer_mean_steps,
    )
    problems = list(parity.broken_limits(limits))
    measured = {**parity.to_json(), "passed": not problems, "problems": problems}
    results = {"parity": {name: {adapter: measured}}}
    if problems:
        what = f"export/{name}/{adapter}: the exported files do not compute what was simulated"
        raise VerificationError(what, problems, results)
    return results
