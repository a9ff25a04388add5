"""Range and bitwidth of each activation of a simulation, and how many encodings have each bitwidth.

min = offset * scale        max = (offset + 2^bitwidth - 1) * scale        per tensor
"""

from __future__ import annotations

from typing import Any

from qwlora.graph.quantized_graph import Kind
from qwlora.grid.encoding import Encoding
from qwlora.simulation.simulation import Simulation

DIGITS = 6  # significant; a simulation has thousands of ranges


def encodings_summary(simulation: Simulation) -> dict[str, Any]:
    """`ranges` of activations by name, and `bits`: encodings by kind and bitwidth."""
    ranges: dict[str, dict[str, float]] = {}
    bits: dict[str, dict[str, int]] = {}
    for name, kind in {mark.name: mark.kind for mark in simulation.marks}.items():
        encoding = simulation.encodings.get(name)
        if encoding is None:  # stays float
            continue
        width = encoding.scheme.bitwidth
        by_width = bits.setdefault(kind.value, {})
        by_width[str(width)] = by_width.get(str(width), 0) + 1
        if kind is Kind.ACTIVATION and isinstance(encoding, Encoding):
            low = encoding.offset * encoding.scale
            high = low + encoding.scheme.steps * encoding.scale
            ranges[name] = {
                "min": _rounded(float(low.min())),
                "max": _rounded(float(high.max())),
                "bitwidth": width,
            }
    return {"ranges": ranges, "bits": bits}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
