"""Several adapters on one frozen base, one active at a time, each with its simulation.

    simulations = simulate_adapters(model, example_inputs, base_activations="none")     # a PeftModel with adapters a and b
    simulations.calibrate(batches)
    simulations["a"].graph(), simulations["b"].graph(), simulations["base"].graph()

"base" is the adapter that adds zero, in the shape of another, so that a runtime gets back to the base by the way it changes adapters. Where an adapter of
zeros would not be the base bit for bit (DoRA, whose magnitudes are divided by norms; modules saved whole), "base" is the graph without any.

A graph is captured once for each structure: names, shapes and scaling of an adapter's weights. An adapter of a structure that was captured goes in by binding
its weights to that graph, if the result is then the model's bit for bit. An inactive adapter has no node in the graph, so it adds nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.export import ExportedProgram

from qwlora.errors import CaptureError
from qwlora.graph.capture import Captured, capture, rebound
from qwlora.graph.half_precision import in_float32
from qwlora.graph.quantized_graph import Kind
from qwlora.grid.encoding import Encoding
from qwlora.nn.frozen import assert_frozen, packed_layers
from qwlora.parameter_names import adapter_of, canonical_name
from qwlora.progress import Track, untracked
from qwlora.simulation.calibration import Stillness
from qwlora.simulation.placement import refuse_idle
from qwlora.simulation.shared_encodings import BaseActivations, SharedObservation, share
from qwlora.simulation.simulation import Origin, Simulation, SimulationSchemes, base_encodings

BASE = "base"
Batches = Collection[Mapping[str, Any]]


@dataclass(frozen=True)
class SharingCost:
    """A measure of one adapter's simulation (perplexity, say) with encodings of its own, and with the shared ones."""

    own: float
    shared: float


class AdapterSimulations(Mapping[str, Simulation]):
    """The simulation of each adapter by its name, "base" among them; made by `simulate_adapters`."""

    def __init__(
        self,
        simulations: Mapping[str, Simulation],
        base_activations: BaseActivations,
        captures: int,
    ):
        self._simulations = dict(simulations)
        self._own: dict[str, dict[str, Encoding]] = {}
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
        stillness: Stillness | None = None,
    ) -> None:
        """Let every adapter see data: each its own by name, or all the same. For `tokens` and `stillness` see `Calibrated.observe`.

        Raises:
            CalibrationError: an adapter got no batch.
        """
        for name, simulation in self.items():
            simulation.observe(
                batches.get(name, ()) if isinstance(batches, Mapping) else batches,
                track,
                tokens,
                stillness,
            )

    def freeze(
        self, shared: Mapping[str, Encoding] | None = None, allow_unseen: bool = False
    ) -> None:
        """Fix all encodings: each adapter's own, and over them the shared ones.

        Args:
            shared: encodings that are fixed already, by an earlier calibration of the same base; made from what all adapters observed unless given.
            allow_unseen: see `Calibrated.freeze`.

        Raises:
            CalibrationError: an activation saw nothing; or what is shared differs in shape among the adapters, or has no encoding in `shared`.
        """
        observation = SharedObservation(self.base_activations)
        for name, simulation in self.items():
            simulation.freeze(allow_unseen)
            self._own[name] = _movable(simulation)
            observation.take_in(simulation)
        self._shared = dict(shared) if shared is not None else observation.encodings()
        for simulation in self.values():
            share(simulation, self._shared, self.base_activations)

    @property
    def shared(self) -> dict[str, Encoding]:
        """The encodings that all adapters share, by name; the base's weights, which never move, are not listed."""
        return dict(self._shared)

    def cost_of_sharing(self, measure: Callable[[Simulation], float]) -> dict[str, SharingCost]:
        """What each adapter pays for sharing, in the units of `measure`."""
        costs = {}
        for name, simulation in self.items():
            shared = measure(simulation)
            _set(simulation, self._own[name])
            own = measure(simulation)
            share(simulation, self._shared, self.base_activations)
            costs[name] = SharingCost(own, shared)
        return costs

    def __getitem__(self, name: str) -> Simulation:
        return self._simulations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._simulations)

    def __len__(self) -> int:
        return len(self._simulations)


def simulate_adapters(
    model: PeftModel,
    example_inputs: Mapping[str, Any],
    schemes: SimulationSchemes | None = None,
    base_activations: BaseActivations = "adapter_only",
    adapters: Collection[str] | None = None,
) -> AdapterSimulations:
    """A simulation of each adapter of `model` alone, and of "base"; the model's active adapter and what is trainable are as before afterwards.

    A placement rule may be about the values of some adapters alone.

    Args:
        base_activations: what adapters share; see `sharing.py`.
        adapters: names of adapters in `model`; all unless given.

    Raises:
        CaptureError: `capture` refuses; or an adapter is named "base", or is not in the model.
        CalibrationError: a placement rule does nothing with any adapter, unless `schemes` allows it.
    """
    names = list(model.peft_config) if adapters is None else list(adapters)
    if BASE in names:
        raise CaptureError(
            f"an adapter is named {BASE!r}, which is the name of the adapter that adds zero; load it under another name"
        )
    if strangers := [name for name in names if name not in model.peft_config]:
        raise CaptureError(
            f"the model has no adapter {', '.join(strangers)}; it has {', '.join(model.peft_config)}"
        )
    if packed_layers(model):
        assert_frozen(model)
    asked = schemes or SimulationSchemes()
    maker = _Maker(model, example_inputs, replace(asked, idle_rules="allow"))
    with _as_before(model), in_float32(model):
        made = {}
        for name in names:
            model.set_adapter(name)
            made[name] = maker.make(_structure(model, name), _weights(model, name))
        with model.disable_adapter():
            made[BASE] = maker.make_base()
    if asked.idle_rules == "refuse":
        refuse_idle([simulation.placement for simulation in made.values()])
    return AdapterSimulations(made, base_activations, maker.captures)


class _Maker:
    """Makes the simulation of what is active in a model, from a graph that was captured before where one fits."""

    def __init__(
        self, model: PeftModel, example_inputs: Mapping[str, Any], schemes: SimulationSchemes
    ):
        self.model, self.example_inputs, self.schemes = model, example_inputs, schemes
        self.encodings = base_encodings(model)
        self.captured: dict[Hashable, tuple[Simulation, dict[str, Tensor]]] = {}
        self.captures = 0

    def make(self, structure: Hashable, weights: dict[str, Tensor]) -> Simulation:
        if structure in self.captured:
            first, bound = self.captured[structure]
            if found := self._bind(
                first, {bound[name].data_ptr(): tensor for name, tensor in weights.items()}
            ):
                return found
        simulation = self._capture()
        self.captured.setdefault(structure, (simulation, weights))
        return simulation

    def make_base(self) -> Simulation:
        """An adapter of zeros; where that is not the base bit for bit, the graph without adapter."""
        zeros = (
            {
                p.data_ptr(): nn.Parameter(torch.zeros_like(p), requires_grad=False)
                for p in bound.values()
            }
            for _, bound in self.captured.values()
        )
        found = (
            self._bind(first, each)
            for (first, _), each in zip(self.captured.values(), zeros, strict=True)
        )
        simulation = (
            next((simulation for simulation in found if simulation is not None), None)
            or self._capture()
        )
        simulation.origin = replace(
            simulation.origin, adapter_fingerprint=None
        )  # the model's own adapter is switched off, not away
        return simulation

    def _capture(self) -> Simulation:
        self.captures += 1
        return self._simulation(capture(self.model, self.example_inputs))

    def _simulation(self, captured: Captured) -> Simulation:
        simulation = Simulation(captured, self.schemes, self.encodings)
        simulation.origin = Origin.of(self.model, self.example_inputs, self.schemes)
        return simulation

    def _bind(self, first: Simulation, tensors: Mapping[int, Tensor]) -> Simulation | None:
        """The graph of `first` with other tensors in the place of those at the given addresses, if it then computes what the model does."""
        program = _with_state(
            first.program,
            {name: tensors.get(t.data_ptr(), t) for name, t in first.program.state_dict.items()},
        )
        try:
            simulation = self._simulation(
                rebound(first.captured, program, self.model, self.example_inputs)
            )
        except CaptureError:
            return None
        for mark in simulation.marks:
            if mark.kind is Kind.PARAMETER:  # the base's: one copy on its grid is enough
                simulation.weights[mark.name] = first.weights[mark.name]
                simulation.graph_module.add_submodule(
                    f"quantizer_{mark.node}", first.weights[mark.name]
                )
        return simulation


def _weights(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The parameters of an adapter, by their paths without its name."""
    return {
        canonical_name(path): p
        for path, p in model.named_parameters(remove_duplicate=False)
        if adapter_of(path) == adapter
    }


def _structure(model: PeftModel, adapter: str) -> Hashable:
    """What two adapters have in common for whom one graph does: all that is not in the values of their parameters."""
    shapes = {(name, tuple(p.shape), p.dtype) for name, p in _weights(model, adapter).items()}
    layers = (
        (path, m)
        for path, m in model.named_modules()
        if isinstance(m, LoraLayer) and adapter in m.scaling
    )
    return frozenset(shapes), frozenset(
        (
            path,
            m.scaling[adapter],
            type(m.lora_variant.get(adapter) if adapter in m.lora_variant else None),
        )
        for path, m in layers
    )


def _with_state(program: ExportedProgram, state: dict[str, Tensor]) -> ExportedProgram:
    return ExportedProgram(
        program.graph_module,
        program.graph,
        program.graph_signature,
        state,
        program.range_constraints,
        program.module_call_graph,
        program.example_inputs,
        program.constants,
        verifiers=program.verifiers,
    )


@contextlib.contextmanager
def _as_before(model: PeftModel) -> Iterator[None]:
    """Afterwards the same adapters are active, and the same parameters trainable."""
    active, trainable = (
        model.active_adapters,
        {name: p.requires_grad for name, p in model.named_parameters()},
    )
    try:
        yield
    finally:
        model.base_model.set_adapter(active)
        model.active_adapter = active[0]
        for name, p in model.named_parameters():
            p.requires_grad_(trainable[name])


def _movable(simulation: Simulation) -> dict[str, Encoding]:
    """The encodings that may differ among adapters, as they are now."""
    own = {*simulation.quantizers, *simulation.adapter_weights}
    return {
        name: encoding
        for name, encoding in simulation.encodings.items()
        if name in own and isinstance(encoding, Encoding)
    }


def _set(simulation: Simulation, encodings: Mapping[str, Encoding]) -> None:
    for name, quantizer in simulation.quantizers.items():
        quantizer.encoding = encodings[name]
    simulation.set_adapter_encodings(encodings)
