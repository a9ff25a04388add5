"""Several adapters on one frozen base, each with its own simulation.

    simulations = simulate_adapters(model, example_inputs)     # PeftModel with adapters a and b
    simulations.calibrate(batches)
    simulations["a"].graph(), simulations["b"].graph(), simulations["base"].graph()

"base" is a zero adapter with the shape of the others: a runtime switches to it to run the base
alone. If a zero adapter would not compute the base bit for bit (DoRA divides by norms;
`modules_to_save` replaces modules), "base" is the graph without any adapter.

`base_activations` says which encodings change when a runtime switches adapters. Its values mean the
same as those of QAIRT's `quant_updatable_mode`:

    all             every activation and the adapter's weights; nothing is shared
    adapter_only    the LoRA branch: lora_A, lora_B, their outputs and the scaled outputs. All other
                    activations share one encoding for all adapters, including the sum with the base
                    layer's output and the values computed from it
    none            nothing: all activations and adapter weights share one set of encodings, so
                    adapters are padded to one shape (`adapter/padded_adapters.py`)

A shared encoding covers the values that all adapters observed. Base weights have one encoding in
every mode.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qwlora.adapter.attach import activate_, adapter_names, restored_adapters, without_adapters
from qwlora.adapter.mergeable import lora_layers
from qwlora.adapter.padded_adapters import common_ranks, padded_adapters
from qwlora.errors import CalibrationError, CaptureError, ExportError, foreign_as, listed
from qwlora.formats import manifest
from qwlora.graph.capturable_model import in_float32
from qwlora.graph.capture import Captured, capture, rebound
from qwlora.graph.graph_analysis import branch_nodes, lora_branch
from qwlora.graph.quantized_graph import Kind, rebuilt
from qwlora.grid.encoding import Encoding, encoding_from_range, group_range
from qwlora.grid.scheme import Scheme
from qwlora.nn.fingerprint import adapter_fingerprint, fingerprint
from qwlora.nn.frozen import assert_frozen
from qwlora.nn.packed_layer import packed_layers
from qwlora.simulation.fake_quantizer import FrozenWeight, Quantizer, estimate_encodings
from qwlora.simulation.placement import refuse_ineffective_rules
from qwlora.simulation.placement_rules import Schemes
from qwlora.simulation.saved_simulation import RECORD, SimulationSource, read_inputs, read_record
from qwlora.simulation.simulation import Batches, Simulation, example_arguments, simulate
from qwlora.system.device import device_of
from qwlora.system.parameter_names import BASE, adapter_of, canonical_name, is_factor_name
from qwlora.system.progress import Track, untracked

BaseActivations = Literal["all", "adapter_only", "none"]
_Weights = Mapping[str, Tensor]  # of an adapter, by path


class AdapterSimulations(dict[str, Simulation]):
    """The simulation of each adapter by name, and of "base"; made by `simulate_adapters`.

    Attributes:
        base_activations: which encodings change with the adapter: adapter_only, all or none.
        captures: how many graphs were captured.
        shared: the shared encodings by name, without those of packed base weights.
    """

    def __init__(self, simulations: Mapping[str, Simulation], base_activations: BaseActivations):
        super().__init__(simulations)
        self.base_activations = base_activations
        # a graph that was bound to other weights keeps the interface of its capture
        self.captures = len({id(s.captured.interface) for s in simulations.values()})
        self.shared: dict[str, Encoding] = {}

    def calibrate(
        self,
        batches: Batches | Mapping[str, Batches],
        track: Track = untracked,
        *,
        shared: Mapping[str, Encoding] | None = None,
    ) -> None:
        """`observe`, then `freeze`. If either raises, encodings and observations stay as they
        were, except that masks which `freeze` found become float."""
        with self._restored_on_error():
            self.observe(batches, track)
            self.freeze(shared=shared)

    def check_unchanged(self) -> None:
        """See `Simulation.check_unchanged`. All adapters need one base."""
        models = [simulation.origin.model for simulation in self.values()]
        # hashed once per model: 1 GB takes 0.6 s, and simulations usually share one model
        bases = {model: fingerprint(model) for model in {*models}}
        for name, simulation in self.items():
            simulation.check_unchanged(bases[simulation.origin.model])
            if simulation.origin.base_fingerprint != bases[models[0]]:
                raise CalibrationError(f"adapter {name} has another base. Simulate all on one base")

    def check_switchable(self) -> None:
        """Refuse adapters with more than LoRA factors: runtimes can switch nothing else."""
        kinds = Kind.ADAPTER, Kind.PARAMETER
        weights = {
            name: [v.name for v in simulation.placement.values if v.kind in kinds]
            for name, simulation in self.items()
        }
        # a weight without an adapter's name is shared if the base's graph reads it too
        for name, read in weights.items():
            unshared = [n for n in read if adapter_of(n) or n not in weights[BASE]]
            if others := [n for n in unshared if not is_factor_name(n)]:
                raise ExportError(
                    f"adapter {name} has {listed(others, 3)}: only LoRA factors can be switched. "
                    "Train without them, or use target onnx_each, one model for each adapter"
                )

    @contextlib.contextmanager
    def _restored_on_error(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for simulation in self.values():
                stack.enter_context(simulation.restored_on_error())
            yield

    def observe(
        self,
        batches: Batches | Mapping[str, Batches],
        track: Track = untracked,
        tokens: int | None = None,
    ) -> None:
        """Run calibration data through every adapter. If it raises, no simulation changes.

        Args:
            batches: one set of batches for all adapters, or a dict with batches for each adapter.
            tokens: see `Simulation.observe`.

        Raises:
            CalibrationError: an adapter got no batch; or see `Simulation.check_unchanged`.
        """
        self.check_unchanged()
        with self._restored_on_error():
            for name, simulation in self.items():
                its_batches = batches.get(name, ()) if isinstance(batches, Mapping) else batches
                simulation.observe_unchecked(its_batches, track, tokens)

    def freeze(
        self, allow_unseen: bool = False, *, shared: Mapping[str, Encoding] | None = None
    ) -> None:
        """Set all encodings: each adapter's own, then the shared ones. If it raises, encodings of
        activations stay as they were, except that masks which it found become float.

        Args:
            allow_unseen: see `Simulation.freeze`.
            shared: encodings from an earlier calibration on the same base. Default: from what all
                adapters observed.

        Raises:
            CalibrationError: an activation saw no data, shared values differ in shape between
                adapters, or one has no encoding in `shared`.
        """
        with self._restored_on_error():
            for simulation in self.values():
                simulation.freeze(allow_unseen)
            if shared is None:
                shared = shared_encodings(self.values(), self.base_activations)
            for simulation in self.values():
                apply_shared_encodings(simulation, shared, self.base_activations)
            self.shared = dict(shared)

    def __repr__(self) -> str:
        return f"AdapterSimulations of {', '.join(self)}: {next(iter(self.values()), 'none')!r}"


def simulate_adapters(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Tensor | Sequence[Tensor],
    schemes: Schemes | None = None,
    base_activations: BaseActivations = "adapter_only",
    adapters: Collection[str] | None = None,
    activation_encodings: Mapping[str, Encoding] | None = None,
) -> AdapterSimulations:
    """Simulate each adapter of `model` alone, and "base".

    Active adapters and trainable parameters are restored afterwards. A placement rule only needs to
    apply to one of the adapters.

    Args:
        model: a `PeftModel`, or a model after `peft.inject_adapter_in_model`.
        example_inputs, schemes: see `simulate`.
        base_activations: which encodings change with the adapter: adapter_only, all or none.
        adapters: names of adapters in `model`. Default: all.
        activation_encodings: see `simulate`. All adapters share these, in every mode.

    Returns:
        The simulations, not calibrated yet.

    Raises:
        CaptureError: see `capture`; or an adapter is called "base", or is not in the model.
        CalibrationError: a placement rule has no effect on any adapter, and `schemes` refuses that;
            or see `simulate`.
    """
    example = example_arguments(model, example_inputs)
    known = adapter_names(model)
    names = known if adapters is None else list(adapters)
    if BASE in names:
        raise CaptureError(
            f"an adapter is called {BASE!r}, the name of the zero adapter. Load it under another "
            "name"
        )
    if unknown := [name for name in names if name not in known]:
        raise CaptureError(f"the model has no adapter {listed(unknown)}. It has {listed(known)}")
    if packed_layers(model):
        assert_frozen(model)
    asked, schemes = schemes, replace(schemes or Schemes(), unused_rules="allow")
    simulations: dict[str, Simulation] = {}
    first: dict[Hashable, tuple[Simulation, _Weights]] = {}  # by structure
    frozen: dict[int, FrozenWeight] = {}

    # A capture takes 10 to 15 s for SmolLM2 (docs/log/runtimes.md), so adapters of one structure
    # share a graph: weights are bound to it, and the result is compared with the model.
    def simulated(
        origin: SimulationSource, graphs: Iterable[tuple[Simulation, _Weights, _Weights]]
    ) -> Simulation:
        captures = (_rebound(*graph, origin) for graph in graphs)
        captured = next(filter(None, captures), None) or capture(model, example)
        return Simulation(captured, origin, frozen, activation_encodings)

    base = fingerprint(model)
    with restored_adapters(model), contextlib.ExitStack() as changes:
        origins = {}
        ranks = common_ranks(model, names) if base_activations == "none" else {}
        for name in names:
            activate_(model, [name])
            origins[name] = SimulationSource.of(model, example, schemes, ranks, base)
        # One cast for all captures: graphs then share the float32 tensors. Padding comes after the
        # fingerprints, which are those of the adapters as they are.
        changes.enter_context(in_float32(model))
        changes.enter_context(padded_adapters(model, names, ranks))
        for name, origin in origins.items():
            activate_(model, [name])
            weights = _weights(model, name)
            structure = _structure(model, name, weights)
            graphs = [(*first[structure], weights)] if structure in first else []
            simulations[name] = simulated(origin, graphs)
            first.setdefault(structure, (simulations[name], weights))
        with without_adapters(model):
            origin = SimulationSource.of(model, example, schemes, ranks, base)
            zeros = (
                (s, bound, {n: nn.Parameter(torch.zeros_like(p), False) for n, p in bound.items()})
                for s, bound in first.values()
            )
            simulations[BASE] = simulated(origin, zeros)
    if asked is None or asked.unused_rules == "refuse":
        refuse_ineffective_rules([simulation.placement for simulation in simulations.values()])
    return AdapterSimulations(simulations, base_activations)


def load_simulation(folder: str | Path, model: nn.Module) -> Simulation:
    """Load the simulation in `folder`, with the graph captured again from `model`. Its logits equal
    those of the saved simulation, bit for bit.

    Args:
        model: the same base with the same adapter, on any device. A zero adapter is loaded with
            `simulate_adapters(...)["base"].restore_from(folder)`.

    Raises:
        CalibrationError: the folder holds no complete simulation, or the base or the adapter has
            another fingerprint.
        FingerprintError: a file changed after it was saved.
    """
    folder = Path(folder)
    record = read_record(folder)
    manifest.check(folder, RECORD, f"simulation {str(folder)!r}", "calibrate again")
    for part, digest, saved in (
        ("base", fingerprint(model), record.base_fingerprint),
        ("adapter", adapter_fingerprint(model), record.adapter_fingerprint),
    ):
        if digest != saved:
            raise CalibrationError(
                f"{str(folder)!r} was calibrated for the {part} with fingerprint "
                f"{saved or '(none)'}, but this model has {digest or '(none)'}. Use the original "
                "model, or calibrate again"
            )
    inputs = read_inputs(folder, record, device_of(model))
    with foreign_as(CalibrationError, f"{str(folder)!r} does not fit the model", "calibrate again"):
        simulation = simulate(model, inputs, record.schemes, ranks=record.ranks)
    simulation.restore_from(folder)
    return simulation


def _rebound(
    first: Simulation, bound: _Weights, weights: _Weights, origin: SimulationSource
) -> Captured | None:
    """The graph of `first` with other adapter weights than `bound`; None if its outputs differ from
    the model's."""
    # by address, since names in the graph are those of the adapter that was captured
    replacements = {bound[name].data_ptr(): tensor for name, tensor in weights.items()}
    state = {
        name: replacements.get(tensor.data_ptr(), tensor)
        for name, tensor in first.program.state_dict.items()
    }
    program = rebuilt(first.program, state_dict=state)
    try:
        return rebound(first.captured, program, origin.model, origin.example_inputs)
    except CaptureError:
        return None


def _weights(model: nn.Module, adapter: str) -> _Weights:
    """The parameters of an adapter by path, without the adapter's name in it."""
    return {
        canonical_name(path): p
        for path, p in model.named_parameters(remove_duplicate=False)
        if adapter_of(path) == adapter
    }


def _structure(model: nn.Module, adapter: str, weights: _Weights) -> Hashable:
    """A key that is equal for adapters that differ only in the values of their parameters."""
    # the scaling is a constant of the graph
    shapes = {(name, tuple(p.shape), p.dtype) for name, p in weights.items()}
    layers = {
        (path, layer.scaling[adapter], type(layer.lora_variant.get(adapter)))
        for path, layer in lora_layers(model)
        if adapter in layer.scaling
    }
    return frozenset(shapes), frozenset(layers)


def shared_encodings(
    simulations: Iterable[Simulation], base_activations: BaseActivations
) -> dict[str, Encoding]:
    """The encodings that frozen simulations share, from the observations of all. With `none`, also
    those of adapter weights."""
    quantizers: dict[str, Quantizer] = {}
    fixed: dict[str, Encoding] = {}
    weights: dict[str, tuple[Scheme, Tensor, Tensor]] = {}  # scheme, low and high ends
    names: set[str] | None = None
    for simulation in simulations:
        adapter_weights = simulation.adapter_weights if base_activations == "none" else {}
        # a graph without any adapter lacks the adapter's values in every mode
        if adapter_weights:
            in_graph = {*simulation.quantizers, *adapter_weights}
            names = in_graph if names is None else names
            if differing := sorted(in_graph ^ names):
                raise CalibrationError(
                    f"{len(differing)} values have an encoding with one adapter and none with "
                    f"another, {differing[0]} first. Adapters that share all encodings need the "
                    "same target_modules, layers and dora, and calibration data that reaches all "
                    "values (more data, or a rule with keep: float); otherwise share less"
                )
        for name in _shared_activations(simulation, base_activations):
            quantizer = simulation.quantizers[name]
            if quantizer.fixed:
                fixed[name] = quantizer.known_encoding()
            elif (earlier := quantizers.get(name)) is None:
                # a copy, because the observations of other adapters are merged into it
                quantizers[name] = copy.deepcopy(quantizer)
            elif earlier.scheme != quantizer.scheme:
                raise CalibrationError(
                    f"adapters disagree on the grid of {name} ({earlier.scheme} vs "
                    f"{quantizer.scheme}). Share less: base_activations all or adapter_only"
                )
            else:
                earlier.observer.merge(quantizer.observer)
        for name, weight in adapter_weights.items():
            scheme = simulation.weights[name].encoding.scheme
            low, high = group_range(weight, scheme)
            known, lowest, highest = weights.get(name, (scheme, low, high))
            if known != scheme or lowest.shape != low.shape:
                raise CalibrationError(
                    f"adapters disagree on {name} ({list(lowest.shape)} scales of {known} vs "
                    f"{list(low.shape)} of {scheme}). To share its encoding, give them the same "
                    "rank; otherwise share less"
                )
            weights[name] = scheme, torch.minimum(low, lowest), torch.maximum(high, highest)
    estimate_encodings(list(quantizers.values()))
    activations = {n: q.encoding for n, q in quantizers.items() if q.encoding is not None}
    of_weights = {n: encoding_from_range(low, high, s) for n, (s, low, high) in weights.items()}
    return activations | fixed | of_weights


def _shared_activations(simulation: Simulation, base_activations: BaseActivations) -> list[str]:
    """Names of the quantized activations whose encodings all adapters share, in graph order."""
    if base_activations == "all":
        return []
    branch = lora_branch(simulation.program) if base_activations == "adapter_only" else set()
    return [
        mark.name
        for mark in simulation.marks
        if mark.name in simulation.quantizers and mark.node not in branch
    ]


def apply_shared_encodings(
    simulation: Simulation, encodings: Mapping[str, Encoding], base_activations: BaseActivations
) -> None:
    """Replace encodings of a frozen simulation by those of `encodings` that it shares."""
    names = _shared_activations(simulation, base_activations)
    # if no earlier adapter changed a layer, the layer's sum keeps its own encoding
    sums = branch_nodes(simulation.program) if base_activations == "adapter_only" else set()
    optional = {mark.name for mark in simulation.marks if mark.node in sums}
    if missing := [name for name in names if name not in {*encodings, *optional}]:
        raise CalibrationError(
            f"{len(missing)} shared activations have no encoding, {missing[0]} first. Observe "
            "every adapter before freezing"
        )
    for name in names:
        if name in encodings:
            simulation.quantizers[name].encoding = encodings[name]
    if base_activations == "none":
        simulation.set_adapter_encodings(encodings)
