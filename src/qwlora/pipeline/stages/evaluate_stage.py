"""Stages `evaluate/...`: perplexity of float model, base, every adapter and every simulation.

evaluate/MODEL             on its own text: that of the base, or of the adapter
evaluate/MODEL/on/TEXT     on the text of another adapter, if adapters have different texts

MODEL is `float`, `base`, `adapted/NAME`, `simulated/NAME`, or, for an adapter from elsewhere,
`imported/NAME`: the float model with the adapter as it came, so that the step to this base can be
seen. The last two are measured on their own text only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.pipeline.stage import PlanBuilder, Stage
from qwlora.pipeline.stages.train_stage import adapter_contents

if TYPE_CHECKING:
    from qwlora.analysis.perplexity import Logits
    from qwlora.pipeline.context import JobContext


NAME = "evaluate"


def add(plan: PlanBuilder, kind: str, needs: tuple[str, ...] = (), name: str | None = None) -> None:
    """Add the stages of one model: `float`, `base`, `imported`, `adapted` or `simulated`."""
    recipe = plan.recipe
    own = recipe.base_text() if name is None else recipe.data_of(name)
    model: list[Any] = [plan.model] if kind in ("float", "imported") else []
    if kind == "imported":
        start = next(a.continue_from for a in recipe.adapters if a.name == name)
        model.append([start, adapter_contents(plan, start)])
    stage = f"{NAME}/{kind}" if name is None else f"{NAME}/{kind}/{name}"
    if own is not None:
        plan.add(stage, [*model, plan.held_out(own)], needs, name)
    if len(recipe.texts()) > 1 and kind not in ("imported", "simulated"):
        for text, data in recipe.texts().items():
            if data != own:
                plan.add(f"{stage}/on/{text}", [*model, plan.held_out(data)], needs, name)


def run(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Measure perplexity on held-out text."""
    from qwlora.analysis.perplexity import logits_of, perplexity

    model, _, other = stage.name.removeprefix(f"{NAME}/").partition("/on/")
    kind, name = model.partition("/")[0], stage.adapter
    text = context.text(other or name)
    if kind == "simulated":
        logits: Logits = context.simulation(str(name)).logits
    else:
        logits = logits_of(
            context.imported(str(name))
            if kind == "imported"
            else context.float_model()
            if kind == "float"
            else context.base()
            if kind == "base"
            else context.adapted(str(name))
        )
    where = f" on the text of {other}" if other else ""
    value = perplexity(logits, text.evaluation, f"perplexity, {kind}{where}", context.track)
    found = {kind: value if name is None else {name: value}}
    return {"perplexity": {"on": {other: found}} if other else found, "data": text.describe()}
