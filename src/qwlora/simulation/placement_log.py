"""The placement log: which values are quantized, on which grid, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qwlora.graph.quantized_graph import GraphValue
from qwlora.simulation.simulation import Simulation


@dataclass(frozen=True)
class LoggedGrid:
    """The grid of a quantized value.

    Args:
        grid: the scheme in words; empty if the value is not quantized.
        observer: how an activation's range is chosen.
        low, high: ends of an activation's grid, once calibrated or fixed.
    """

    grid: str = ""
    observer: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class PlacementLog:
    """All values: weights and inputs first, then computed values, in graph order.

    Args:
        policy: name of the policy.
        grids: of the quantized values, by name.
        unknown: number of occurrences of each unknown operator.
    """

    policy: str
    values: tuple[GraphValue, ...]
    grids: Mapping[str, LoggedGrid]
    unknown: dict[str, int]

    def grid(self, value: GraphValue) -> LoggedGrid:
        """The grid of a value."""
        return self.grids.get(value.name, LoggedGrid())

    def to_json(self) -> dict[str, Any]:
        """The log as JSON values."""
        return {
            "policy": self.policy,
            "unknown": self.unknown,
            "values": [value.to_json() | asdict(self.grid(value)) for value in self.values],
        }


def explain(simulation: Simulation, policy: str) -> PlacementLog:
    """The placement log of a simulation, calibrated or not."""
    placement = simulation.placement
    return PlacementLog(
        policy,
        (*placement.weights, *placement.explanation),
        {value.name: _grid(simulation, value.name) for value in placement.marks},
        dict(placement.unknown),
    )


def _grid(simulation: Simulation, name: str) -> LoggedGrid:
    quantizer = simulation.quantizers.get(name)
    if quantizer is None:
        return LoggedGrid(str(simulation.encoding_of_weight(name).scheme))
    low, high = quantizer.minimum, quantizer.maximum
    if quantizer.encoding is not None:
        scale, offset = float(quantizer.encoding.scale), int(quantizer.encoding.offset)
        low, high = scale * offset, scale * (offset + quantizer.scheme.steps)
    return LoggedGrid(str(quantizer.scheme), quantizer.estimator.name, low, high)
