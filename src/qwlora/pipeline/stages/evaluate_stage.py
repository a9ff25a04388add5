"""Stages `evaluate/...`: perplexity of float model, base, every adapter and every simulation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.pipeline.stage import PlanBuilder, Stage

if TYPE_CHECKING:
    from qwlora.analysis.perplexity import Logits
    from qwlora.pipeline.context import JobContext


NAME = "evaluate"


def add(plan: PlanBuilder, what: str, needs: tuple[str, ...] = (), name: str | None = None) -> None:
    """Add the stage of one kind of model: `float`, `base`, `adapted` or `simulated`."""
    inputs = [plan.model, plan.held_out] if what == "float" else plan.held_out
    stage = f"{NAME}/{what}" if name is None else f"{NAME}/{what}/{name}"
    plan.add(stage, inputs, needs, name)


def run(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Measure perplexity on held-out text."""
    from qwlora.analysis.perplexity import logits_of, perplexity
    from qwlora.data.prepared_data import describe

    _, kind, *_ = stage.name.split("/")
    name = stage.adapter
    if kind == "simulated":
        logits: Logits = context.simulation(str(name)).logits
    else:
        logits = logits_of(
            context.float_model()
            if kind == "float"
            else context.base()
            if kind == "base"
            else context.adapted(str(name))
        )
    value = perplexity(logits, context.evaluation, f"perplexity, {kind}", context.track)
    return {
        "perplexity": {kind: value if name is None else {name: value}},
        "data": describe(context.documents, context.data),
    }
