"""What several adapters on one base share: encodings of one name that are one, and how they come to be.

The words are those of QAIRT's `quant_updatable_mode`: what may change when an adapter takes the place of another.

    all             every activation encoding and the adapter's weights: each adapter has its own, calibrated with it alone
    adapter_only    the adapter's own values (`branch.py`) and its weights; the base's activations have one set of encodings for all adapters
    none            nothing: one encoding for each activation, and one for each adapter weight, which then have one shape

A shared encoding is that of everything any adapter saw: observers of one name are merged, and frozen once. The base's weights have one encoding in any case.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

from qwlora.errors import CalibrationError
from qwlora.graph.adapter_branch import branch_nodes
from qwlora.graph.move_graph import device_of, moved_encoding
from qwlora.grid.encoding import Encoding
from qwlora.grid.observers import MinMaxObserver
from qwlora.simulation.estimate_encodings import estimate
from qwlora.simulation.fake_quantizer import Quantizer
from qwlora.simulation.simulation import Simulation

BaseActivations = Literal["all", "adapter_only", "none"]


class SharedObservation:
    """What the simulations of several adapters saw of the values they share.

    Args:
        base_activations: what is shared; see the module's text.
    """

    def __init__(self, base_activations: BaseActivations):
        self.base_activations = base_activations
        self._activations: dict[str, Quantizer] = {}
        self._weights: dict[str, MinMaxObserver] = {}
        self._names: set[str] | None = None

    def take_in(self, simulation: Simulation) -> None:
        """Add what `simulation`, which is frozen, observed, and the values of its adapter's weights where those are shared.

        Raises:
            CalibrationError: a value has another shape or scheme than in the simulations before; or, where nothing may differ, one of them lacks it.
        """
        if (
            self.base_activations == "none" and simulation.adapter_weights
        ):  # the graph without any adapter has no value of one
            self._refuse_other_names(simulation)
        for name in shared_activations(simulation, self.base_activations):
            quantizer = simulation.quantizers[name]
            if name not in self._activations:
                self._activations[name] = copy.deepcopy(quantizer)
            elif self._activations[name].scheme != quantizer.scheme:
                raise CalibrationError(
                    f"{name} is to be {self._activations[name].scheme} with one adapter and {quantizer.scheme} with another; share less"
                )
            else:
                self._activations[name].observer.merge(quantizer.observer)
        if self.base_activations == "none":
            encodings = simulation.encodings
            for name, weight in simulation.adapter_weights.items():
                observer = MinMaxObserver(encodings[name].scheme)
                observer.update(weight)
                _merge(
                    name, self._weights.setdefault(name, MinMaxObserver(observer.scheme)), observer
                )

    def _refuse_other_names(self, simulation: Simulation) -> None:
        names = {*simulation.quantizers, *simulation.adapter_weights}
        if self._names is None:
            self._names = names
        if differ := sorted(names ^ self._names):
            why = (
                "one adapter's data did not reach it; calibrate on more data, or keep it float by a rule"
                if all(
                    name in simulation.dropped or name in simulation.quantizers for name in differ
                )
                else "adapters that share every encoding are on the same layers and of one kind: "
                "give them the same target_modules, layers and dora, or share less"
            )
            raise CalibrationError(
                f"{len(differ)} values have an encoding with one adapter and none with another, {differ[0]} first; {why}"
            )

    def encodings(self) -> dict[str, Encoding]:
        """The shared encodings by name, in order of the graph of the first simulation."""
        for quantizer in self._activations.values():
            quantizer.encoding = None
        estimate(list(self._activations.values()))
        found = {
            name: q.encoding for name, q in self._activations.items() if q.encoding is not None
        }
        return found | {name: observer.encoding() for name, observer in self._weights.items()}


def shared_activations(simulation: Simulation, base_activations: BaseActivations) -> list[str]:
    """Names of the quantized activations of `simulation` whose encodings all adapters share, in order of the graph."""
    if base_activations == "all":
        return []
    own = branch_nodes(simulation.program) if base_activations == "adapter_only" else set()
    return [
        mark.name
        for mark in simulation.marks
        if mark.name in simulation.quantizers and mark.node not in own
    ]


def share(
    simulation: Simulation, encodings: Mapping[str, Encoding], base_activations: BaseActivations
) -> None:
    """Give a frozen simulation the shared encodings, in the place of its own.

    Raises:
        CalibrationError: an activation that is shared has no encoding among them.
        GridError: the grid of a weight does not fit it.
    """
    names = shared_activations(simulation, base_activations)
    if missing := [name for name in names if name not in encodings]:
        raise CalibrationError(
            f"{len(missing)} shared activations have no encoding, {missing[0]} first; observe every adapter before freezing"
        )
    device = device_of(simulation.graph_module)
    for name in names:
        simulation.quantizers[name].encoding = moved_encoding(encodings[name], device)
    if base_activations == "none":
        simulation.set_adapter_encodings(encodings)


def _merge(name: str, observer: MinMaxObserver, other: MinMaxObserver) -> None:
    try:
        observer.merge(other)
    except CalibrationError as error:
        raise CalibrationError(
            f"{name} differs among the adapters ({error}); what is shared must have one shape: give the adapters one rank, or share less"
        ) from error
