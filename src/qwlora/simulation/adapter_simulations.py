"""Several adapters on one frozen base, each with its own simulation.

    simulations = simulate_adapters(model, example_inputs)     # PeftModel with adapters a and b
    simulations.calibrate(batches)
    simulations["a"].graph(), simulations["b"].graph(), simulations["base"].graph()

"base" is a zero adapter in the shape of the others: a runtime that can switch adapters switches to
it to run the base alone. Where an adapter of zeros does not compute the base bit for bit (DoRA
divides by norms; `modules_to_save` replaces modules), "base" is the graph without any adapter.

Adapters of the same structure (names, shapes and scaling of their weights) share one captured
graph. The next adapter's weights are bound to it and the result is compared with the model, bit for
bit; if it differs, that adapter is captured by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qwlora.adapter.active_adapters import (
    activate_,
    active_adapters,
    adapter_names,
    without_adapters,
)
from qwlora.errors import CaptureError
from qwlora.graph.capture import Captured, capture, rebound
from qwlora.graph.half_precision import in_float32
from qwlora.graph.quantized_graph import Kind, with_state
from qwlora.grid.encoding import Encoding
from qwlora.nn.frozen import assert_frozen, packed_layers
from qwlora.parameter_names import adapter_of, canonical_name
from qwlora.progress import Track, untracked
from qwlora.simulation.calibration import Batches
from qwlora.simulation.placement import refuse_ineffective_rules
from qwlora.simulation.shared_encodings import (
    BaseActivations,
    SharedObservation,
    apply_shared_encodings,
)
from qwlora.simulation.simulation import Simulation
from qwlora.simulation.simulation_schemes import SimulationSchemes, SimulationSource

BASE = "base"


class AdapterSimulations(Mapping[str, Simulation]):
    """The simulation of each adapter by name, and of "base"; made by `simulate_adapters`.

    Attributes:
        captures: how many graphs were captured.
    """

    def __init__(
        self,
        simulations: Mapping[str, Simulation],
        base_activations: BaseActivations,
        captures: int,
    ):
        self._simulations = dict(simulations)
        self._shared: dict[str, Encoding] = {}
        self.base_activations = base_activations
        self.captures = captures

    def calibrate(
        self,
        batches: Batches | Mapping[str, Batches],
        shared: Mapping[str, Encoding] | None = None,
        track: Track = untracked,
    ) -> None:
        """`observe`, then `freeze`."""
        self.observe(batches, track)
        self.freeze(shared)

    def observe(
        self,
        batches: Batches | Mapping[str, Batches],
        track: Track = untracked,
        tokens: int | None = None,
    ) -> None:
        """Run calibration data through every adapter.

        Args:
            batches: for all adapters, or by adapter.
            tokens: see `Simulation.observe`.

        Raises:
            CalibrationError: an adapter got no batch.
        """
        for name, simulation in self.items():
            own = batches.get(name, ()) if isinstance(batches, Mapping) else batches
            simulation.observe(own, track, tokens)

    def freeze(
        self, shared: Mapping[str, Encoding] | None = None, allow_unseen: bool = False
    ) -> None:
        """Set all encodings: each adapter's own, then the shared ones.

        Args:
            shared: of an earlier calibration on the same base. Default: from what all adapters
                observed.
            allow_unseen: see `Simulation.freeze`.

        Raises:
            CalibrationError: an activation saw no data, shared values differ in shape between
                adapters, or one has no encoding in `shared`.
        """
        observation = SharedObservation(self.base_activations)
        for simulation in self.values():
            simulation.freeze(allow_unseen)
            observation.add(simulation)
        self._shared = dict(shared) if shared is not None else observation.encodings()
        for simulation in self.values():
            apply_shared_encodings(simulation, self._shared, self.base_activations)

    @property
    def shared(self) -> dict[str, Encoding]:
        """The shared encodings by name, without those of packed base weights."""
        return dict(self._shared)

    def __repr__(self) -> str:
        return f"AdapterSimulations of {', '.join(self)}: {next(iter(self.values()), 'none')!r}"

    def __getitem__(self, name: str) -> Simulation:
        return self._simulations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._simulations)

    def __len__(self) -> int:
        return len(self._simulations)


def simulate_adapters(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    schemes: SimulationSchemes | None = None,
    base_activations: BaseActivations = "adapter_only",
    adapters: Collection[str] | None = None,
) -> AdapterSimulations:
    """Simulate each adapter of `model` (a `PeftModel`, or a model after
    `peft.inject_adapter_in_model`) alone, and "base".

    Active adapters and trainable parameters are restored afterwards. A placement rule only needs to
    apply to one of the adapters.

    Args:
        base_activations: what adapters share; see `shared_encodings.py`.
        adapters: names of adapters in `model`. Default: all.

    Raises:
        CaptureError: see `capture`; or an adapter is called "base", or is not in the model.
        CalibrationError: a placement rule has no effect on any adapter, and `schemes` refuses that.
    """
    known = adapter_names(model)
    names = known if adapters is None else list(adapters)
    if BASE in names:
        raise CaptureError(
            f"an adapter is called {BASE!r}, the name of the zero adapter. Load it under another "
            "name"
        )
    if unknown := [name for name in names if name not in known]:
        raise CaptureError(
            f"the model has no adapter {', '.join(unknown)}. It has {', '.join(known)}"
        )
    if packed_layers(model):
        assert_frozen(model)
    schemes = schemes or SimulationSchemes()
    maker = _SimulationMaker(model, example_inputs, replace(schemes, unused_rules="allow"))
    simulations = {}
    with restored_adapters(model), in_float32(model):
        for name in names:
            activate_(model, [name])
            simulations[name] = maker.make(_structure(model, name), _weights(model, name))
        with without_adapters(model):
            simulations[BASE] = maker.make_base()
    if schemes.unused_rules == "refuse":
        refuse_ineffective_rules([simulation.placement for simulation in simulations.values()])
    return AdapterSimulations(simulations, base_activations, maker.captures)


class _SimulationMaker:
    """Simulates the active adapter of a model, on an earlier graph of the same structure if any."""

    def __init__(
        self, model: nn.Module, example_inputs: Mapping[str, Any], schemes: SimulationSchemes
    ):
        self.model, self.example_inputs, self.schemes = model, example_inputs, schemes
        self.captured: dict[Hashable, tuple[Simulation, dict[str, Tensor]]] = {}
        self.captures = 0

    def make(self, structure: Hashable, weights: dict[str, Tensor]) -> Simulation:
        origin = self._origin()
        if structure in self.captured:
            first, bound = self.captured[structure]
            replacements = {bound[name].data_ptr(): tensor for name, tensor in weights.items()}
            simulation = self._bind(first, replacements, origin)
            if simulation is not None:
                return simulation
        simulation = self._capture(origin)
        self.captured.setdefault(structure, (simulation, weights))
        return simulation

    def make_base(self) -> Simulation:
        """A zero adapter, or the graph without adapter where that is not the base bit for bit."""
        # the model's own adapter is disabled, not removed, and would be in the fingerprint
        origin = replace(self._origin(), adapter_fingerprint=None)
        for first, bound in self.captured.values():
            zeros = {
                p.data_ptr(): nn.Parameter(torch.zeros_like(p), requires_grad=False)
                for p in bound.values()
            }
            simulation = self._bind(first, zeros, origin)
            if simulation is not None:
                return simulation
        return self._capture(origin)

    def _origin(self) -> SimulationSource:
        return SimulationSource.of(self.model, self.example_inputs, self.schemes)

    def _capture(self, origin: SimulationSource) -> Simulation:
        self.captures += 1
        return Simulation(capture(self.model, self.example_inputs), origin)

    def _bind(
        self, first: Simulation, replacements: Mapping[int, Tensor], origin: SimulationSource
    ) -> Simulation | None:
        """The graph of `first` with other tensors; None if it then does not compute the model.

        Args:
            replacements: by the address of the tensor to replace.
        """
        state = first.program.state_dict
        program = with_state(
            first.program,
            {name: replacements.get(t.data_ptr(), t) for name, t in state.items()},
        )
        try:
            captured: Captured = rebound(first.captured, program, self.model, self.example_inputs)
        except CaptureError:
            return None
        parameters = [mark.name for mark in first.marks if mark.kind is Kind.PARAMETER]
        return Simulation(captured, origin, {name: first.weights[name] for name in parameters})


def _weights(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The parameters of an adapter by path, without the adapter's name in it."""
    return {
        canonical_name(path): p
        for path, p in model.named_parameters(remove_duplicate=False)
        if adapter_of(path) == adapter
    }


def _structure(model: nn.Module, adapter: str) -> Hashable:
    """Equal for adapters that differ in the values of their parameters only."""
    shapes = {(name, tuple(p.shape), p.dtype) for name, p in _weights(model, adapter).items()}
    layers = {
        (path, module.scaling[adapter], type(module.lora_variant.get(adapter)))
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }
    return frozenset(shapes), frozenset(layers)


@contextlib.contextmanager
def restored_adapters(model: nn.Module) -> Iterator[None]:
    """Restore active adapters and trainable parameters on exit."""
    active = active_adapters(model)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        yield
    finally:
        activate_(model, active)
        for name, p in model.named_parameters():
            p.requires_grad_(trainable[name])
