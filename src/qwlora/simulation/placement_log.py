"""What was placed where, on which grid, and why: the answer to "why is this value (not) quantized?"."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qwlora.simulation.fake_quantizer import Quantizer
from qwlora.simulation.placement_rules import Decision
from qwlora.simulation.simulation import Simulation


@dataclass(frozen=True)
class Explained:
    """One value of the graph.

    Args:
        kind: of the tensor: base, adapter, parameter or activation.
        grid: the scheme in words; empty where there is none.
        observer: how an activation's range is chosen.
        low, high: the ends of the grid once it is known, of a value with one scale.
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
class Explanation:
    """All values: weights and inputs first, then what is computed, in order of the graph.

    Args:
        policy: its name.
        unknown: operators that no rule knows, with how often they occur.
    """

    policy: str
    values: tuple[Explained, ...]
    unknown: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "policy": self.policy,
            "unknown": self.unknown,
            "values": [asdict(value) for value in self.values],
        }


def explain(simulation: Simulation, policy: str) -> Explanation:
    """The placement of a simulation, calibrated or not."""
    kinds = {mark.node: mark.kind.value for mark in simulation.marks}
    values = []
    for placed in (*simulation.placement.weights, *simulation.explanation):
        known = {
            f: getattr(placed, f)
            for f in ("name", "module", "operator", "module_class", "decision", "reason")
        }
        values.append(
            Explained(
                **known,
                kind=kinds.get(
                    placed.node, "activation" if placed.operator != "weight" else "parameter"
                ),
                **_grid(simulation, placed),
            )
        )
    return Explanation(policy, tuple(values), dict(simulation.placement.unknown))


def _grid(simulation: Simulation, placed: Any) -> dict[str, Any]:
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
