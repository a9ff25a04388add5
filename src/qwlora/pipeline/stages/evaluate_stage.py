"""Perplexity of float model, base, every adapter and every simulation, and how far each of the last
three is from the float model on the same tokens. The stages are listed in `plan/plan.py`.

`imported/NAME` is the float model with an adapter from elsewhere as it came, so that the step to
this base can be seen. It and `simulated/NAME` are measured on their own text only.

KL divergence and token agreement are measured on the model's own text, and for the base on every
text, if there is a float model. It runs again beside the other one, sequence by sequence: keeping
its logits would take gigabytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from qwlora.analysis.token_scores import Logits, logits_of, score_tokens
from qwlora.formats.model_source import fetch
from qwlora.pipeline.plan.plan import Stage, is_compared
from qwlora.pipeline.running.loaded_models import JobContext


def run(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Score the model on held-out text."""
    model, _, other = stage.name.removeprefix("evaluate/").partition("/on/")
    kind, name = model.partition("/")[0], stage.adapter
    text = context.text(other or name)
    logits, reference = _models(context, kind, name, compared=is_compared(kind, other))
    what = f"perplexity, {kind} on the text of {other}" if other else f"perplexity, {kind}"
    scores = score_tokens(logits, text.evaluation, what, context.track, reference)
    results: dict[str, Any] = {"data": text.describe()}
    for key, value in scores.to_json().items():
        by_model = {kind: value if name is None else {name: value}}
        results[key] = {"on": {other: by_model}} if other else by_model
    return results


def _models(
    context: JobContext, kind: str, name: str | None, compared: bool
) -> tuple[Logits, Logits | None]:
    """Logits of a model, and those of the float model if they are to be compared."""
    if kind == "float":
        return logits_of(context.float_model()), None
    if kind == "imported":
        imported = context.imported(str(name))
        own = logits_of(imported)

        def without_adapter(ids: Tensor) -> Tensor:
            with imported.disable_adapter():
                return own(ids)

        return own, without_adapter
    logits: Logits
    if kind == "simulated":
        logits = context.simulation(str(name)).logits
    else:
        logits = logits_of(context.base() if kind == "base" else context.adapted(str(name)))
    if not compared or not fetch(context.recipe.model.source).holds_floats:
        return logits, None
    # Loading a base releases the float model, so it is loaded after it; the context must not keep
    # it in memory through the stages that follow.
    return logits, logits_of(context.take_float_model())
