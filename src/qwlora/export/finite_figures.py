"""Figures of a runtime that computes NaN, infinity or far too large logits.

Such a runtime fails its proof like any other wrong one. JSON holds no such numbers, so files leave
these figures out (`only_finite`), and tables say `not finite` (`shown`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def perplexity(nll: float, tokens: int) -> float:
    """`exp(nll / tokens)`; infinite if that overflows, NaN if `nll` is.

    Args:
        nll: sum of the losses of `tokens` tokens, nats.
    """
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def largest(differences: Tensor) -> float:
    """The largest of absolute differences; infinite if one is NaN or infinite."""
    found = float(differences.max())  # torch's max, unlike Python's, is NaN if any value is
    return math.inf if math.isnan(found) else found


def is_same(found: Tensor, other: Tensor) -> bool:
    """Whether two results are equal, also in where they hold NaN."""
    return found.allclose(other, rtol=0, atol=0, equal_nan=True)


def only_finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """`figures`, and those nested in them, without numbers that are NaN or infinite."""
    return {
        key: only_finite(value) if isinstance(value, Mapping) else value
        for key, value in figures.items()
        if not isinstance(value, float) or math.isfinite(value)
    }


def shown(figures: Mapping[str, Any], key: str, form: str) -> str:
    """A figure in a format such as `.3f`, or `not finite` if it was left out."""
    return format(figures[key], form) if key in figures else "not finite"
