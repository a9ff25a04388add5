"""The ratio of a signal to the noise that a grid adds, in dB."""

from __future__ import annotations

import math


def sqnr_db(signal: float, noise: float) -> float:
    """`10 log10(signal / noise)` of two sums of squares: infinite without noise, minus infinite
    without signal, NaN if one of them is NaN or infinite.
    """
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if not noise:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio else -math.inf
