"""The simulation: the captured graph with a quantizer at every placed value.

    sim = simulate(model, example_inputs)      # capture, place, give the weights their encodings
    sim.calibrate(batches)                     # one pass: activation ranges (`calibrate.py`)
    sim(input_ids=ids, attention_mask=mask)    # what integer hardware would compute, in the model's own result class

The graph computes in float32, also where the model is bfloat16 or float16; see `half_precision.py`.

Base weights are packed integers in the graph already, and never move. LoRA weights and what step 1 left float get encodings from their own values, at once;
activations from data, in one pass over float activations.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from qwlora.errors import CalibrationError, CaptureError
from qwlora.graph.aten_ops import MAY_ALIAS, base_name, is_known
from qwlora.graph.capture import Captured, capture
from qwlora.graph.graph_analysis import operator_of
from qwlora.graph.move_graph import moved_encoding, rewrite_devices_, unshare_moving_
from qwlora.graph.perturbed_graph import SumInHalves
from qwlora.graph.quantized_graph import Kind, Mark, QuantizedGraph, insert_after
from qwlora.grid.encoding import Encoding
from qwlora.grid.float_offset import FloatOffsetEncoding
from qwlora.grid.observers import measure
from qwlora.grid.range_estimator import Estimator, as_estimator
from qwlora.grid.scheme import PerChannel, PerTensor, Scheme
from qwlora.messages import listed
from qwlora.nn.fingerprint import adapter_fingerprint
from qwlora.nn.frozen import assert_frozen, packed_layers
from qwlora.nn.unwrap import unwrapped
from qwlora.parameter_names import is_factor_name, parameter_name
from qwlora.simulation.calibration import Calibrated
from qwlora.simulation.fake_quantizer import FrozenWeight, Mode, Quantizer
from qwlora.simulation.placement import Overrides, Placement, place
from qwlora.simulation.placement_rules import Decision, IdleRules, PlacementRule, Policy

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SimulationSchemes:
    """Grids of what step 1 did not fix, and where they go. Vectors (norm weights, biases) are always quantized per tensor.

    Args:
        activations: one scale for each.
        adapter_weights: of lora_A and lora_B.
        parameters: of all other weights that step 1 left float, those of an adapter too (`modules_to_save`, biases, DoRA's magnitudes).
        policy: which values get a quantizer: `npu`, `matmul-inputs`, `weights-only`, or a `rules.Policy` of your own.
        rules: tried before the policy's.
        observer: how the range of an activation is chosen, see `Estimator`.
        quantize_residual_adds, symmetric_matmul_second_input, idle_rules: see `place`.
    """

    activations: Scheme = Scheme(16, symmetric=False)
    adapter_weights: Scheme = Scheme(8, granularity=PerChannel(0))
    parameters: Scheme = Scheme(16, granularity=PerChannel(0))
    quantize_residual_adds: bool = False
    policy: str | Policy = "npu"
    rules: Sequence[PlacementRule] = ()
    observer: str | Estimator = "min-max"
    symmetric_matmul_second_input: bool = False
    idle_rules: IdleRules = "refuse"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))

    def placement(self, program: ExportedProgram, input_names: Mapping[str, str]) -> Placement:
        """What `place` decides about a program."""
        return place(
            program,
            self.policy,
            self.rules,
            self.quantize_residual_adds,
            self.symmetric_matmul_second_input,
            input_names,
            self.idle_rules,
        )


@dataclass(frozen=True)
class Origin:
    """What a simulation was made from, and the fingerprint of the adapter that was active then."""

    model: nn.Module
    example_inputs: Mapping[str, Any]
    schemes: SimulationSchemes
    adapter_fingerprint: str | None

    @classmethod
    def of(
        cls, model: nn.Module, example_inputs: Mapping[str, Any], schemes: SimulationSchemes
    ) -> Origin:
        return cls(model, dict(example_inputs), schemes, adapter_fingerprint(model))


class Simulation(Calibrated):
    """See the module's text. Call it like the captured model: the same arguments by name, or the first of `inputs` by position; the same type of result."""

    origin: Origin  # no submodule: the model is the user's

    def __init__(
        self,
        captured: Captured,
        schemes: SimulationSchemes,
        base_encodings: Mapping[str, Encoding | FloatOffsetEncoding],
    ):
        super().__init__()
        self.captured, program = captured, captured.program
        self.placement = schemes.placement(program, captured.input_names)
        self.placement.take_out(
            captured.interface.cached,
            Decision.SHARE,
            "comes from a cache: the encoding with which it was kept holds it",
        )
        self.marks: list[Mark] = self.placement.marks
        self.explanation = self.placement.explanation
        if twice := [
            name for name, count in Counter(m.name for m in self.marks).items() if count > 1
        ]:
            raise CaptureError(
                f"two values would carry the name {twice[0]}; activate one adapter at a time"
            )
        self._base_encodings = {
            m.name: base_encodings[m.name] for m in self.marks if m.kind is Kind.BASE
        }
        self._frozen: dict[int, FrozenWeight] = {}  # by storage, so that a tied weight is kept once
        self.graph_module: GraphModule = program.module(check_guards=False)
        self._insert(schemes)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in order."""
        return self.captured.interface.inputs

    def forward(self, *first: Tensor, **arguments: Any) -> Any:
        """What the model returns, simulated.

        Raises:
            CalibrationError: an activation has no encoding yet, and this is not inside `only`. So do all that compute simulated values.
            CaptureError: see `Captured.bind`.
        """
        return self.captured.result_of(
            self._simulated({**dict(zip(self.inputs, first, strict=False)), **arguments})
        )

    @property
    def encodings(self) -> dict[str, Encoding | FloatOffsetEncoding]:
        """All encodings by name, in order of the graph.

        Raises:
            CalibrationError: before `calibrate`.
        """
        self._refuse_uncalibrated()
        known = {
            **self._base_encodings,
            **self._weight_encodings(),
            **{name: q.encoding for name, q in self.quantizers.items()},
        }
        return {
            mark.name: encoding for mark in self.marks if (encoding := known[mark.name]) is not None
        }

    def encoding_of_weight(self, name: str) -> Encoding | FloatOffsetEncoding:
        """The encoding of a weight, of the base, the adapter or left float; it is known before `calibrate`."""
        return (
            self._base_encodings[name]
            if name in self._base_encodings
            else self.weights[name].encoding
        )

    @property
    def program(self) -> ExportedProgram:
        """The captured graph, without quantizers."""
        return self.captured.program

    @property
    def adapter_weights(self) -> dict[str, Tensor]:
        """The float weights of the adapter, by name."""
        targets = {
            name: str(node.args[0].target)  # type: ignore[union-attr]
            for name, node in self._adapter_nodes()
        }
        return {
            name: _attribute(self.graph_module, target).detach() for name, target in targets.items()
        }

    def set_adapter_encodings(self, encodings: Mapping[str, Encoding]) -> None:
        """Lay the adapter's weights on grids from elsewhere, in the place of those that their own values give; names that it lacks are not looked at.

        Raises:
            GridError: a grid does not fit its weight.
        """
        weights = self.adapter_weights
        for name, node in self._adapter_nodes():
            if name in encodings:
                self.weights[name] = FrozenWeight(
                    weights[name], moved_encoding(encodings[name], weights[name].device)
                )
                self.graph_module.add_submodule(str(node.target), self.weights[name])

    def restore(
        self, encodings: Mapping[str, Encoding | FloatOffsetEncoding], dropped: Collection[str] = ()
    ) -> None:
        """Take activation encodings that were calibrated earlier.

        Args:
            dropped: names of values that calibration left float, see `Calibrated.dropped`; they stay float if they have no encoding.

        Raises:
            CalibrationError: an encoding names no value of this graph, a weight's encoding is not the one its values give, or an activation has none.
        """
        known = {mark.name for mark in self.marks}
        if strangers := [name for name in encodings if name not in known]:
            raise CalibrationError(
                f"encodings name values that the graph does not have: {listed(strangers, 3)}; calibrate again"
            )
        for name, encoding in {**self._base_encodings, **self._weight_encodings()}.items():
            if name not in encodings or not _same(encodings[name], encoding):
                raise CalibrationError(
                    f"the encoding of {name} is not the one that its values give; calibrate again"
                )
        if missing := [
            name for name in self.quantizers if name not in encodings and name not in dropped
        ]:
            raise CalibrationError(
                f"{len(missing)} activations have no encoding, {missing[0]} first: the encodings are of another placement; calibrate again. "
                "Values that calibration left float are named by dropped=other.dropped"
            )
        for name, quantizer in list(self.quantizers.items()):
            if isinstance(found := encodings.get(name), Encoding):
                quantizer.scheme = found.scheme
                quantizer.encoding = found
            else:
                self._drop(name, "left float by the calibration that is restored")
        self._place_encodings()
        self._set_mode(Mode.SIMULATE)

    @property
    def base_encodings(self) -> Mapping[str, Encoding | FloatOffsetEncoding]:
        """The encodings of the base's packed weights, which are the base's own."""
        return self._base_encodings

    def model(self) -> PreTrainedModel:
        """The simulation with the call of the transformers model that it was made from; see `as_model`.

        Raises:
            CalibrationError: an activation has no encoding yet.
        """
        self._refuse_uncalibrated()
        from qwlora.simulation.simulated_model import as_model

        return as_model(self)

    def save(self, folder: str | Path) -> None:
        """Write the simulation; `load_simulation` reads it. See `storage`."""
        from qwlora.simulation.simulation_folder import save_simulation

        save_simulation(self, folder)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to(device)`; the model that the graph was captured from stays where it is.

        Raises:
            CaptureError: it would change a type.
        """
        held = {tensor.dtype for tensor in (*self.parameters(), *self.buffers())} | {
            torch.float32
        }  # float32: the scales
        if any(fn(torch.empty(0, dtype=dtype)).dtype != dtype for dtype in held):
            raise CaptureError(
                "A simulation cannot be cast: its graph computes in float32, for models in half precision "
                "too. Only its device can be changed, with to(device)"
            )
        unshare_moving_(self.graph_module, fn)
        super()._apply(fn, recurse)
        device = fn(torch.empty(0)).device
        rewrite_devices_(self.graph_module, device)
        self._place_encodings(device)
        for quantizer in self.quantizers.values():
            quantizer.observer = quantizer.observer.to(device)
        return self

    def graph(self) -> QuantizedGraph:
        """What a writer needs."""
        observer = as_estimator(self.origin.schemes.observer).name
        marks = tuple(self.marks)
        return QuantizedGraph(
            self.program, self.captured.interface, marks, self.encodings, observer
        )

    def logits(self, ids: Tensor) -> Tensor:
        """The primary output for full sequences of ids [batch, tokens], simulated: logits [batch, tokens, vocabulary] of a causal language model."""
        return self.outputs({"input_ids": ids})[self.captured.interface.primary]

    def perturbed_logits(self, ids: Tensor) -> Tensor:
        """`logits` by an equally right computation, see `perturbed_outputs`."""
        return self.perturbed_outputs({"input_ids": ids})[self.captured.interface.primary]

    def outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every output by name, simulated."""
        with torch.no_grad():
            return self.captured.named(self._simulated(batch))

    def primary(self, batch: Mapping[str, Any]) -> Tensor:
        """The primary output, with gradients where they are enabled."""
        return self.captured.named(self._simulated(batch))[self.captured.interface.primary]

    def perturbed_outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`outputs` by an equally right computation: `x * (1 / scale)` for `x / scale`, and each product summed in two halves.

        float32 leaves both open, and runtimes choose differently; how far this lies from `outputs` is how far two right files may lie apart.
        """
        self._refuse_uncalibrated()
        self._set_mode(Mode.RECIPROCAL)
        try:
            with torch.no_grad():
                return self.captured.named(
                    SumInHalves(self.graph_module).run(*self.captured.bind(batch))
                )
        finally:
            self._set_mode(Mode.SIMULATE)

    def values(self, batch: Tensor | Mapping[str, Any]) -> dict[str, Tensor]:
        """Every quantized activation of one simulated forward, by name; for the model's arguments, or ids of full sequences."""
        for quantizer in self.quantizers.values():
            quantizer.keep = True
        try:
            self.outputs({"input_ids": batch} if isinstance(batch, Tensor) else batch)
            return {name: q.seen for name, q in self.quantizers.items() if q.seen is not None}
        finally:
            for quantizer in self.quantizers.values():
                quantizer.keep, quantizer.seen = False, None

    def bind(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The graph's inputs by name, from the model's arguments."""
        return dict(zip(self.inputs, self.captured.bind(batch), strict=True))

    def _simulated(self, batch: Mapping[str, Any]) -> Sequence[Tensor]:
        """A forward with every quantizer, or with those that `only` chose."""
        if not self._chosen:
            self._refuse_uncalibrated()
        return self._run(batch)

    def _run(self, batch: Mapping[str, Any]) -> Sequence[Tensor]:
        outputs: Sequence[Tensor] = self.graph_module(*self.captured.bind(batch))
        return outputs

    def _insert(self, schemes: SimulationSchemes) -> None:
        nodes = {node.name: node for node in self.graph_module.graph.nodes}
        placeholders = _node_of_placeholder(self.program, self.graph_module)
        for mark in self.marks:
            if mark.kind is Kind.BASE:
                continue
            node = placeholders.get(mark.node) or nodes[mark.node]
            overrides = self.placement.overrides.get(mark.name, Overrides())
            if mark.kind is Kind.ACTIVATION:
                scheme = _with_overrides(schemes.activations, overrides)
                estimator = overrides.observer or as_estimator(schemes.observer)
                quantizer: nn.Module = Quantizer(
                    mark.name,
                    scheme,
                    estimator,
                    overrides.minimum,
                    overrides.maximum,
                    _is_fresh(node),
                )
                self.quantizers[mark.name] = quantizer  # type: ignore[assignment]
            else:
                scheme = (
                    schemes.adapter_weights if is_factor_name(mark.name) else schemes.parameters
                )
                quantizer = self.weights[mark.name] = self._frozen_weight(
                    mark.name, node, _with_overrides(scheme, overrides)
                )
            target = f"quantizer_{mark.node}"
            self.graph_module.add_submodule(target, quantizer)
            insert_after(node, partial(_call_module, target=target))
        self.graph_module.recompile()

    def _frozen_weight(self, name: str, node: Node, scheme: Scheme) -> FrozenWeight:
        weight = _attribute(self.graph_module, str(node.target)).detach()
        frozen = self._frozen.get(weight.data_ptr())
        if frozen is not None and frozen.value.shape == weight.shape:
            return frozen
        if weight.ndim < 2:
            scheme = Scheme(scheme.bitwidth, scheme.symmetric, PerTensor())
        try:
            encoding = measure(weight, scheme)
        except CalibrationError as error:
            raise CalibrationError(f"{name}: {error}") from error
        self._frozen[weight.data_ptr()] = frozen = FrozenWeight(weight, encoding)
        return frozen

    def _adapter_nodes(self) -> list[tuple[str, Node]]:
        """Name of each adapter weight, and the node that puts it on its grid."""
        calls = {str(n.target): n for n in self.graph_module.graph.nodes if n.op == "call_module"}
        return [
            (m.name, calls[f"quantizer_{m.node}"]) for m in self.marks if m.kind is Kind.ADAPTER
        ]

    def _weight_encodings(self) -> dict[str, Encoding]:
        return {name: weight.encoding for name, weight in self.weights.items()}


def _with_overrides(scheme: Scheme, overrides: Overrides) -> Scheme:
    bitwidth = scheme.bitwidth if overrides.bitwidth is None else overrides.bitwidth
    return replace(
        scheme,
        bitwidth=bitwidth,
        symmetric=scheme.symmetric if overrides.symmetric is None else overrides.symmetric,
    )


def _is_fresh(node: Node) -> bool:
    """Whether the value of `node` is storage of its own. A quantizer behind it is then its only reader, and may overwrite it."""
    operator = operator_of(node) if node.op == "call_function" else ""
    return is_known(operator) and base_name(operator) == operator and operator not in MAY_ALIAS


def _call_module(node: Node, target: str) -> Node:
    return node.graph.call_module(target, (node,))


def simulate(
    model: nn.Module, example_inputs: Mapping[str, Any], schemes: SimulationSchemes | None = None
) -> Simulation:
    """Capture `model` (a frozen base, with or without an adapter) and place quantizers; see `capture` for the errors.

    Args:
        example_inputs: the model's keyword arguments, nested as the model takes them, with at least two tokens; see `capture`.
    """
    model = unwrapped(model)
    schemes = schemes or SimulationSchemes()
    packed = packed_layers(model)
    if packed:
        assert_frozen(model)
    elif any(parameter.ndim > 1 for parameter in model.parameters()):
        warnings.warn(
            f"{type(model).__name__} has no packed layer, so the simulation has no base encodings: "
            f"all weights get the grid of SimulationSchemes.parameters ({schemes.parameters}). "
            "To simulate integer weights, call qwlora.quantize_ first",
            stacklevel=2,
        )
    simulation = Simulation(capture(model, example_inputs), schemes, base_encodings(model))
    if packed and not simulation.base_encodings:
        raise CaptureError(
            f"the captured graph uses none of the {len(packed)} packed layers of "
            f"{type(model).__name__}, {next(iter(packed))} first: something computes other weights "
            "in their place. Remove patched forwards, or pass inputs that reach these layers"
        )
    simulation.origin = Origin.of(model, example_inputs, schemes)
    return simulation


def base_encodings(model: nn.Module) -> dict[str, Encoding | FloatOffsetEncoding]:
    """The encodings of the packed weights of `model`, by the names of the weights."""
    return {
        parameter_name(path): encoding
        for path, module in model.named_modules()
        if isinstance(encoding := getattr(module, "encoding", None), Encoding | FloatOffsetEncoding)
    }


def _same(a: Encoding | FloatOffsetEncoding, b: Encoding | FloatOffsetEncoding) -> bool:
    lows = [e.minimum if isinstance(e, FloatOffsetEncoding) else e.offset for e in (a, b)]
    return a.scheme == b.scheme and all(
        torch.equal(x.to(y.device), y) for x, y in ((a.scale, b.scale), lows)
    )


def _node_of_placeholder(program: ExportedProgram, module: GraphModule) -> dict[str, Node]:
    """In the module, parameters are attributes; find the attribute node of each placeholder of the program."""
    by_target = {str(n.target): n for n in module.graph.nodes if n.op == "get_attr"}
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    specs = {
        s.arg.name: s.target for s in program.graph_signature.input_specs if s.target is not None
    }
    found = {name: by_target[target] for name, target in specs.items() if target in by_target}
    return found | dict(zip(program.graph_signature.user_inputs, inputs, strict=True))


def _attribute(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), name)
    return tensor
