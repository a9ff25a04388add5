"""Stage `calibrate-base`, workflow qwa-lora only: encodings of the base's activations.

Adapters are then trained through the quantized activations.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.pipeline.job.job_paths import BASE_SIMULATION
from qwlora.pipeline.plan.stage import PlanBuilder, Stage
from qwlora.pipeline.stages.calibrate_stage import range_inputs

if TYPE_CHECKING:
    from qwlora.pipeline.running.loaded_models import JobContext


NAME = "calibrate-base"


def add(plan: PlanBuilder) -> None:
    """Add the stage if the workflow is qwa-lora."""
    if plan.recipe.workflow == "qwa-lora":
        plan.add(
            NAME,
            range_inputs(plan, plan.recipe.base_texts()),
            ("quantize",),
            artifact=BASE_SIMULATION,
        )


def run(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Calibrate the base without an adapter."""
    from qwlora.simulation.simulation import simulate

    base = context.base()
    with context.step("capturing the graph"):
        simulation = simulate(base, context.example_inputs, context.schemes)
    context.check_rules(simulation.placement)
    report = context.calibrate(simulation)
    simulation.save(scratch)
    return {
        "base_simulation": {
            "encodings": len(simulation.encodings),
            "calibration_tokens": report.tokens,
        }
    }
