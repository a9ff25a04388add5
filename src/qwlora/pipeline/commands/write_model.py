"""Merge an adapter of a job into its base, and measure what that loses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwlora.adapter.adapter_deltas import Into, merged_model, rounding_losses
from qwlora.adapter.mergeable import is_mergeable
from qwlora.analysis.token_scores import logits_of, score_tokens
from qwlora.formats.base_folder import save_base
from qwlora.pipeline.stages.job_context import JobContext
from qwlora.system.progress import Track

KEPT = 0.9  # share of the adapter's improvement that a merge must keep to be called harmless


def merge_effect(
    layers: Mapping[str, dict[str, float]], base: float, adapted: float, merged: float
) -> dict[str, Any]:
    """Effect of merging an adapter into the base's integers, for `qwlora merge-check --json`.

    Args:
        layers: rounding loss by canonical layer path; empty for a mergeable adapter.
        base, adapted, merged: perplexities of the base, with the adapter, and requantized.

    Returns:
        The arguments; `share` of the delta's entries that are smaller than half a step; `kept`, the
        share of the improvement in perplexity that is left (may be negative; None if there was
        none); `is_harmless` and a `recommendation`.
    """
    gained = base - adapted
    kept = (base - merged) / gained if gained > 0 else None
    is_harmless = kept is not None and kept >= KEPT
    if kept is None:
        advice = "There is nothing to merge."
    elif is_harmless:
        advice = "Merge, or keep the adapter separate to swap adapters."
    else:
        advice = (
            f"Keep the adapter separate, or use --into float: less than {KEPT:.0%} of its "
            "improvement is left in the integers."
        )
    below, entries = (sum(loss[key] for loss in layers.values()) for key in ("below", "entries"))
    return {
        "share": below / max(1, entries),
        "base": base,
        "adapted": adapted,
        "merged": merged,
        "kept": kept,
        "is_harmless": is_harmless,
        "recommendation": advice,
        "layers": layers,
    }


def merge_verdict(context: JobContext, name: str, track: Track) -> dict[str, Any]:
    """Measure the effect of merging adapter `name`; see `merge_effect`."""
    evaluation = context.text(name).evaluation

    def measured(model: Any, what: str) -> float:
        return score_tokens(logits_of(model), evaluation, f"perplexity, {what}", track).perplexity

    adapted = context.unmerged(name)
    before = measured(context.base(), "base")
    if is_mergeable(adapted):
        after = measured(merged_model(adapted), "adapted")
        return merge_effect({}, before, after, after)
    layers, after = rounding_losses(adapted), measured(adapted, "adapted")
    return merge_effect(layers, before, after, measured(merged_model(adapted), "merged"))


def write_merged(context: JobContext, name: str, into: Into, folder: Path) -> None:
    """Write the merged model of adapter `name` into the empty `folder`.

    Into float: a Hugging Face checkpoint. Requantized: a base, as `save_base` writes it.
    """
    merged = merged_model(context.unmerged(name), into)
    if into == "float":
        merged.save_pretrained(folder)
        context.tokenizer.save_pretrained(folder)
    else:
        save_base(merged, folder, context.tokenizer, source=context.recipe.model.source)
