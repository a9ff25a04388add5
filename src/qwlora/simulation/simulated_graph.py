"""A captured graph with a quantizer at every placed value.

    base weights      packed integers, dequantized in the graph; their encodings never change
    other weights     the adapter's and what step 1 left float: on their grids from the start
    activations       calibrated in one pass over float activations (`calibration.py`)

`simulation.py` adds what users call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from qwlora.errors import CalibrationError, CaptureError
from qwlora.graph.aten_ops import MAY_ALIAS, base_name, is_known
from qwlora.graph.capture import Captured
from qwlora.graph.graph_analysis import operator_of
from qwlora.graph.move_graph import moved_encoding, rewrite_devices_, unshare_moving_
from qwlora.graph.perturbed_graph import SumInHalves
from qwlora.graph.quantized_graph import Kind, Mark, QuantizedGraph, insert_after
from qwlora.grid.encoding import Encoding
from qwlora.grid.float_offset import FloatOffsetEncoding
from qwlora.grid.observers import measure
from qwlora.grid.range_estimator import as_estimator
from qwlora.grid.scheme import PerTensor, Scheme
from qwlora.messages import listed
from qwlora.nn.fingerprint import adapter_fingerprint
from qwlora.nn.frozen import packed_layers
from qwlora.parameter_names import is_factor_name, parameter_name
from qwlora.simulation.calibration import CalibratedGraph
from qwlora.simulation.fake_quantizer import FrozenWeight, Mode, Quantizer
from qwlora.simulation.placement import Overrides
from qwlora.simulation.placement_rules import Decision
from qwlora.simulation.simulation_schemes import SimulationSchemes


@dataclass(frozen=True)
class Origin:
    """What a simulation was made from.

    Args:
        adapter_fingerprint: of the active adapter at that time; None if there was none, or for a
            zero adapter.
    """

    model: nn.Module
    example_inputs: Mapping[str, Any]
    schemes: SimulationSchemes
    adapter_fingerprint: str | None

    @classmethod
    def of(
        cls, model: nn.Module, example_inputs: Mapping[str, Any], schemes: SimulationSchemes
    ) -> Origin:
        return cls(model, dict(example_inputs), schemes, adapter_fingerprint(model))


class SimulatedGraph(CalibratedGraph):
    """Call it like the captured model: the same arguments by name, or the first of `inputs` by
    position. It returns the model's result type.

    Args:
        captured: the graph of `origin.model`.

    Raises:
        CaptureError: two values would have the same name.
        CalibrationError: a weight is not finite, or see `place`.
    """

    def __init__(self, captured: Captured, origin: Origin):
        super().__init__()
        self.captured, self.origin = captured, origin
        schemes, program = origin.schemes, captured.program
        self.placement = schemes.placement(program, captured.input_names)
        self.placement.exclude(
            captured.interface.cached,
            Decision.SHARE,
            "comes from the cache, on the grid of the output that filled it",
        )
        self.marks: list[Mark] = self.placement.marks
        self.explanation = self.placement.explanation
        counts = Counter(mark.name for mark in self.marks)
        duplicates = [name for name, count in counts.items() if count > 1]
        if duplicates:
            raise CaptureError(
                f"two values would have the name {duplicates[0]}; activate one adapter at a time"
            )
        packed = base_encodings(origin.model)
        self._base_encodings = {
            mark.name: packed[mark.name] for mark in self.marks if mark.kind is Kind.BASE
        }
        # by address, so that tied weights share one quantized copy
        self._frozen: dict[int, FrozenWeight] = {}
        self.graph_module: GraphModule = program.module(check_guards=False)
        self._insert(schemes)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in order."""
        return self.captured.interface.inputs

    def forward(self, *first: Tensor, **arguments: Any) -> Any:
        """The model's result, simulated.

        Raises:
            CalibrationError: an activation has no encoding yet, outside of `only`. The same holds
                for every method that computes simulated values.
            CaptureError: see `Captured.bind`.
        """
        return self.captured.result_of(
            self._simulated({**dict(zip(self.inputs, first, strict=False)), **arguments})
        )

    @property
    def encodings(self) -> dict[str, Encoding | FloatOffsetEncoding]:
        """All encodings by name, in graph order; base weights included.

        Raises:
            CalibrationError: before `calibrate`.
        """
        self._refuse_uncalibrated()
        known = {
            **self._base_encodings,
            **self._weight_encodings(),
            **{name: q.encoding for name, q in self.quantizers.items() if q.encoding is not None},
        }
        return {mark.name: known[mark.name] for mark in self.marks}

    def encoding_of_weight(self, name: str) -> Encoding | FloatOffsetEncoding:
        """The encoding of a weight; known before `calibrate`."""
        if name in self._base_encodings:
            return self._base_encodings[name]
        return self.weights[name].encoding

    @property
    def program(self) -> ExportedProgram:
        """The captured graph, without quantizers."""
        return self.captured.program

    @property
    def adapter_weights(self) -> dict[str, Tensor]:
        """The float weights of the adapter, by name."""
        return {
            name: _attribute(self.graph_module, str(_source(node).target)).detach()
            for name, node in self._adapter_nodes()
        }

    def set_adapter_encodings(self, encodings: Mapping[str, Encoding]) -> None:
        """Quantize adapter weights on the given grids instead of the measured ones.

        Args:
            encodings: by name; names that are not adapter weights are ignored.

        Raises:
            GridError: the shape of an encoding does not match its weight.
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
        """Use the encodings of an earlier calibration.

        Args:
            encodings: of all values, weights included.
            dropped: activations that calibration left float, see `CalibratedGraph.dropped`.

        Raises:
            CalibrationError: an encoding has no value in this graph, a weight's encoding is not
                the one measured from its values, or an activation has no encoding.
        """
        known = {mark.name for mark in self.marks}
        unknown = [name for name in encodings if name not in known]
        if unknown:
            raise CalibrationError(
                f"{len(unknown)} encodings have no value in the graph: "
                f"{listed(unknown, 3)}. Calibrate again"
            )
        for name, encoding in {**self._base_encodings, **self._weight_encodings()}.items():
            if name not in encodings or not encoding.equals(encodings[name]):
                raise CalibrationError(
                    f"the encoding of {name} does not match the weight's values. Calibrate again"
                )
        missing = [name for name in self.quantizers if name not in {*encodings, *dropped}]
        if missing:
            raise CalibrationError(
                f"{len(missing)} activations have no encoding, {missing[0]} first: the encodings "
                "belong to another placement. Calibrate again, or name the values that calibration "
                "left float: dropped=other.dropped"
            )
        for name, quantizer in list(self.quantizers.items()):
            found = encodings.get(name)
            if isinstance(found, Encoding):
                quantizer.scheme = found.scheme
                quantizer.encoding = found
            else:
                self._drop(name, "left float by the restored calibration")
        self._place_encodings()
        self._set_mode(Mode.SIMULATE)

    @property
    def base_encodings(self) -> Mapping[str, Encoding | FloatOffsetEncoding]:
        """The encodings of the base's packed weights."""
        return self._base_encodings

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device; the captured model stays where it is.

        Raises:
            CaptureError: `fn` would change a dtype.
        """
        dtypes = {tensor.dtype for tensor in (*self.parameters(), *self.buffers())}
        dtypes.add(torch.float32)  # of the scales
        if any(fn(torch.empty(0, dtype=dtype)).dtype != dtype for dtype in dtypes):
            raise CaptureError(
                "A simulation cannot be cast: its graph computes in float32, for models in half "
                "precision too. Only its device can be changed, with to(device)"
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
        """The graph and its encodings, for an exporter."""
        observer = as_estimator(self.origin.schemes.observer).name
        marks = tuple(self.marks)
        return QuantizedGraph(
            self.program, self.captured.interface, marks, self.encodings, observer
        )

    def logits(self, ids: Tensor) -> Tensor:
        """The simulated primary output for unpadded ids [batch, tokens]; for a causal language
        model, logits [batch, tokens, vocabulary]."""
        return self.outputs({"input_ids": ids})[self.captured.interface.primary]

    def perturbed_logits(self, ids: Tensor) -> Tensor:
        """`logits` with another order of float operations, see `perturbed_outputs`."""
        return self.perturbed_outputs({"input_ids": ids})[self.captured.interface.primary]

    def outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every simulated output by name."""
        with torch.no_grad():
            return self.captured.named(self._simulated(batch))

    def primary(self, batch: Mapping[str, Any]) -> Tensor:
        """The primary output, with gradients where they are enabled."""
        return self.captured.named(self._simulated(batch))[self.captured.interface.primary]

    def perturbed_outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`outputs` with other, equally valid float32 arithmetic: `x * (1 / scale)` instead of
        `x / scale`, and every matrix product summed in two halves.

        Runtimes differ in both. The distance to `outputs` is the noise floor of a comparison
        between two correct runtimes.
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
        """Every quantized activation of one simulated forward, by name.

        Args:
            batch: the model's arguments, or unpadded ids [batch, tokens].
        """
        for quantizer in self.quantizers.values():
            quantizer.record = True
        try:
            self.outputs({"input_ids": batch} if isinstance(batch, Tensor) else batch)
            return {n: q.recorded for n, q in self.quantizers.items() if q.recorded is not None}
        finally:
            for quantizer in self.quantizers.values():
                quantizer.record, quantizer.recorded = False, None

    def bind(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The graph's inputs by name, from the model's arguments."""
        return dict(zip(self.inputs, self.captured.bind(batch), strict=True))

    def _simulated(self, batch: Mapping[str, Any]) -> Sequence[Tensor]:
        """One forward with every quantizer, or with those that `only` enables."""
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
        """Name of each adapter weight, and the node of its quantizer."""
        calls = {str(n.target): n for n in self.graph_module.graph.nodes if n.op == "call_module"}
        return [
            (m.name, calls[f"quantizer_{m.node}"]) for m in self.marks if m.kind is Kind.ADAPTER
        ]

    def _weight_encodings(self) -> dict[str, Encoding]:
        return {name: weight.encoding for name, weight in self.weights.items()}


def _with_overrides(scheme: Scheme, overrides: Overrides) -> Scheme:
    bitwidth = scheme.bitwidth if overrides.bitwidth is None else overrides.bitwidth
    symmetric = scheme.symmetric if overrides.symmetric is None else overrides.symmetric
    return replace(scheme, bitwidth=bitwidth, symmetric=symmetric)


def _is_fresh(node: Node) -> bool:
    """Whether the value of `node` shares no storage, so that the quantizer may overwrite it."""
    operator = operator_of(node) if node.op == "call_function" else ""
    return is_known(operator) and base_name(operator) == operator and operator not in MAY_ALIAS


def _call_module(node: Node, target: str) -> Node:
    return node.graph.call_module(target, (node,))


def base_encodings(model: nn.Module) -> dict[str, Encoding | FloatOffsetEncoding]:
    """The encodings of the packed weights of `model`, by weight name."""
    return {parameter_name(path): layer.encoding for path, layer in packed_layers(model).items()}


def _node_of_placeholder(program: ExportedProgram, module: GraphModule) -> dict[str, Node]:
    """By placeholder of the program, its node in `module`, where parameters are attributes."""
    by_target = {str(n.target): n for n in module.graph.nodes if n.op == "get_attr"}
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    specs = {
        s.arg.name: s.target for s in program.graph_signature.input_specs if s.target is not None
    }
    found = {name: by_target[target] for name, target in specs.items() if target in by_target}
    return found | dict(zip(program.graph_signature.user_inputs, inputs, strict=True))


def _source(node: Node) -> Node:
    """The node that a quantizer's node reads."""
    (source,) = node.all_input_nodes
    return source


def _attribute(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), name)
    return tensor
