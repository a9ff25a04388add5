"""Merge an adapter of a job into its base, and measure what that loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwlora.adapter.adapter_deltas import Into, merge_effect, merged_model, rounding_losses
from qwlora.adapter.mergeable import is_mergeable
from qwlora.analysis.token_scores import logits_of, score_tokens
from qwlora.formats.base_folder import save_base
from qwlora.pipeline.stages.job_context import JobContext
from qwlora.system.progress import Track


def merge_verdict(context: JobContext, name: str, track: Track) -> dict[str, Any]:
    """Measure the effect of merging adapter `name`; see `merge_effect`."""
    evaluation = context.text(name).evaluation

    def measured(model: Any, what: str) -> float:
        return score_tokens(logits_of(model), evaluation, f"perplexity, {what}", track).perplexity

    adapted = context.unmerged(name)
    before = measured(context.base(), "base")
    # Merging is exact, so the model is measured once (docs/log/training.md).
    if is_mergeable(adapted):
        after = measured(merged_model(adapted), "adapted")
        return merge_effect({}, before, after, after)
    layers, after = rounding_losses(adapted), measured(adapted, "adapted")
    return merge_effect(layers, before, after, measured(merged_model(adapted), "merged"))


def write_merged(context: JobContext, name: str, into: Into, folder: Path) -> None:
    """Write the merged model of adapter `name`, a checkpoint or a base, into the empty `folder`."""
    merged = merged_model(context.unmerged(name), into)
    if into == "float":
        merged.save_pretrained(folder)
        context.tokenizer.save_pretrained(folder)
    else:
        save_base(merged, folder, context.tokenizer, source=context.recipe.model.source)
