"""The placement log: which values are quantized, on which grid, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qwlora.simulation.fake_quantizer import Quantizer
from qwlora.simulation.placement import Placed
from qwlora.simulation.placement_rules import Decision
from qwlora.simulation.simulated_graph import SimulatedGraph


@dataclass(frozen=True)
class LoggedValue:
    """A value of the graph.

    Args:
        kind: base, adapter, parameter or activation.
        grid: the scheme in words; empty if the value is not quantized.
        observer: how an activation's range is chosen.
        low, high: ends of an activation's grid, once calibrated or fixed.
    """

    name: str
    module: str
    operator: str
    module_class: str
    kind: str
    decision: Decision
    reason: str
    grid: str = ""
    observer: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class PlacementLog:
    """All values: weights and inputs first, then computed values, in graph order.

    Args:
        policy: name of the policy.
        unknown: number of occurrences of each unknown operator.
    """

    policy: str
    values: tuple[LoggedValue, ...]
    unknown: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The log as JSON values."""
        return {
            "policy": self.policy,
            "unknown": self.unknown,
            "values": [asdict(value) for value in self.values],
        }


def explain(simulation: SimulatedGraph, policy: str) -> PlacementLog:
    """The placement log of a simulation, calibrated or not."""
    kinds = {mark.node: mark.kind.value for mark in simulation.marks}
    values = []
    for placed in (*simulation.placement.weights, *simulation.explanation):
        unmarked = "parameter" if placed.operator == "weight" else "activation"
        values.append(
            LoggedValue(
                placed.name,
                placed.module,
                placed.operator,
                placed.module_class,
                kinds.get(placed.node, unmarked),
                placed.decision,
                placed.reason,
                **_grid(simulation, placed),
            )
        )
    return PlacementLog(policy, tuple(values), dict(simulation.placement.unknown))


def _grid(simulation: SimulatedGraph, placed: Placed) -> dict[str, Any]:
    if placed.decision is not Decision.QUANTIZE:
        return {}
    if placed.name in simulation.quantizers:
        return _grid_of_activation(simulation.quantizers[placed.name])
    encoding = simulation.encoding_of_weight(placed.name)
    return {"grid": str(encoding.scheme)}


def _grid_of_activation(quantizer: Quantizer) -> dict[str, Any]:
    known: dict[str, Any] = {"grid": str(quantizer.scheme), "observer": quantizer.estimator.name}
    if quantizer.encoding is not None:
        scale, offset = float(quantizer.encoding.scale), int(quantizer.encoding.offset)
        known |= {"low": scale * offset, "high": scale * (offset + quantizer.scheme.steps)}
    elif quantizer.minimum is not None or quantizer.maximum is not None:
        known |= {"low": quantizer.minimum, "high": quantizer.maximum}
    return known
