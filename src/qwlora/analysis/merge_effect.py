"""What merging an adapter into the base's integers leaves of its improvement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
