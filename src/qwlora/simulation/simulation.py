"""The simulation: the captured graph with a quantizer at every placed value.

    sim = simulate(model, example_inputs)      # capture, place, give the weights their encodings
    sim.calibrate(batches)                     # one pass: activation ranges
    sim(input_ids=ids, attention_mask=mask)    # what integer hardware would compute, in the type that the model returns

Base weights are packed integers in the graph already, and never move. LoRA weights and what step 1 left float get encodings from their own values, at once;
activations from data, in one pass over float activations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from qwlora.errors import CalibrationError, CaptureError
from qwlora.grid.encoding import Encoding
from qwlora.grid.float_offset import FloatOffsetEncoding
from qwlora.grid.graph import Kind, Mark, QuantizedGraph, insert_after
from qwlora.grid.names import parameter_name
from qwlora.grid.observer import measure
from qwlora.grid.scheme import PerChannel, PerTensor, Scheme
from qwlora.progress import Track, untracked
from qwlora.simulation.capture import Captured, capture
from qwlora.simulation.perturbed import SumInHalves
from qwlora.simulation.place import MASKS, Decision, Placed, place
from qwlora.simulation.quantizer import Mode, Quantizer


@dataclass(frozen=True)
class SimulationSchemes:
    """Grids of what step 1 did not fix. Vectors (norm weights, biases) are always quantized per tensor; for residual additions see `place`."""

    activations: Scheme = Scheme(16, symmetric=False)
    adapter_weights: Scheme = Scheme(8, granularity=PerChannel(0))
    parameters: Scheme = Scheme(16, granularity=PerChannel(0))
    quantize_residual_adds: bool = False


class Simulation(nn.Module):
    """See the module's text. Call it like the captured model: the same arguments by name, or the first of `inputs` by position; the same type of result."""

    def __init__(self, captured: Captured, schemes: SimulationSchemes, base_encodings: Mapping[str, Encoding | FloatOffsetEncoding]):
        super().__init__()
        self.captured, program = captured, captured.program
        placement = place(program, schemes.quantize_residual_adds)
        self.marks: list[Mark] = _named_inputs(placement.marks, captured)
        self.explanation: list[Placed] = placement.explanation
        if twice := [name for name, count in Counter(m.name for m in self.marks).items() if count > 1]:
            raise CaptureError(f"two values would carry the name {twice[0]}; activate one adapter at a time")
        self._program = program
        self._base_encodings = {m.name: base_encodings[m.name] for m in self.marks if m.kind is Kind.BASE}
        self._weight_encodings: dict[str, Encoding] = {}
        self._frozen: dict[int, _FrozenWeight] = {}  # by storage, so that a tied weight is kept once
        self._quantizers: dict[str, Quantizer] = {}
        self.graph_module: GraphModule = program.module(check_guards=False)
        self._insert(schemes)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in order."""
        return self.captured.interface.inputs

    def forward(self, *first: Tensor, **arguments: Any) -> Any:
        return self.captured.result_of(self.graph_module(*self.captured.bind({**dict(zip(self.inputs, first, strict=False)), **arguments})))

    def calibrate(self, batches: Collection[Mapping[str, Any]], track: Track = untracked) -> None:
        """Observe the activations of all `batches` (each the model's arguments by name), then fix their encodings.

        Values that only a mask can hold (beyond 1e30) lose their quantizer, and `explanation` says so.

        Raises:
            CalibrationError: there was no batch, or an activation is not finite; the message names it.
        """
        self._set_mode(Mode.OBSERVE)
        count = 0
        with torch.no_grad():
            for batch in track(batches, "calibrating", len(batches)):
                self(**batch)
                count += 1
        if not count:
            raise CalibrationError("calibration needs at least one batch")
        operators = {p.node: p.operator for p in self.explanation}
        nodes = {mark.name: mark.node for mark in self.marks}
        for name, quantizer in list(self._quantizers.items()):
            if quantizer.is_mask and operators.get(nodes[name]) in MASKS:
                self._drop(name, "a mask: values beyond 1e30")
            else:
                quantizer.freeze()
        self._set_mode(Mode.SIMULATE)

    @property
    def encodings(self) -> dict[str, Encoding | FloatOffsetEncoding]:
        """All encodings by name, in order of the graph.

        Raises:
            CalibrationError: before `calibrate`.
        """
        activations = {name: q.encoding for name, q in self._quantizers.items()}
        if missing := [name for name, encoding in activations.items() if encoding is None]:
            raise CalibrationError(f"{len(missing)} activations have no encoding yet, {missing[0]} first; call calibrate")
        known = {**self._base_encodings, **self._weight_encodings, **activations}
        return {mark.name: encoding for mark in self.marks if (encoding := known[mark.name]) is not None}

    def restore(self, encodings: Mapping[str, Encoding | FloatOffsetEncoding]) -> None:
        """Take activation encodings that were calibrated earlier; a value without one has been found to be a mask.

        Raises:
            CalibrationError: an encoding names no value of this graph, or a weight's encoding is not the one its values give.
        """
        known = {mark.name for mark in self.marks}
        if strangers := [name for name in encodings if name not in known]:
            raise CalibrationError(f"encodings name values that the graph does not have: {', '.join(strangers[:3])}; calibrate again")
        for name, encoding in {**self._base_encodings, **self._weight_encodings}.items():
            if name not in encodings or not _same(encodings[name], encoding):
                raise CalibrationError(f"the encoding of {name} is not the one that its values give; calibrate again")
        for name, quantizer in list(self._quantizers.items()):
            if isinstance(found := encodings.get(name), Encoding):
                quantizer.encoding = found
            else:
                self._drop(name, "a mask: values beyond 1e30")
        self._set_mode(Mode.SIMULATE)

    def graph(self) -> QuantizedGraph:
        """What a writer needs."""
        return QuantizedGraph(self._program, self.captured.interface, tuple(self.marks), self.encodings)

    def logits(self, ids: Tensor) -> Tensor:
        """The primary output for full sequences of ids [batch, tokens], simulated: logits [batch, tokens, vocabulary] of a causal language model."""
        return self.outputs({"input_ids": ids})[self.captured.interface.primary]

    def perturbed_logits(self, ids: Tensor) -> Tensor:
        """`logits` by an equally right computation, see `perturbed_outputs`."""
        return self.perturbed_outputs({"input_ids": ids})[self.captured.interface.primary]

    def outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every output by name, simulated."""
        with torch.no_grad():
            return self.captured.named(self.graph_module(*self.captured.bind(batch)))

    def perturbed_outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`outputs` by an equally right computation: `x * (1 / scale)` for `x / scale`, and each product summed in two halves.

        float32 leaves both open, and runtimes choose differently; how far this lies from `outputs` is how far two right files may lie apart.
        """
        self._set_mode(Mode.RECIPROCAL)
        try:
            with torch.no_grad():
                return self.captured.named(SumInHalves(self.graph_module).run(*self.captured.bind(batch)))
        finally:
            self._set_mode(Mode.SIMULATE)

    def values(self, batch: Tensor | Mapping[str, Any]) -> dict[str, Tensor]:
        """Every quantized activation of one simulated forward, by name; for the model's arguments, or ids of full sequences."""
        for quantizer in self._quantizers.values():
            quantizer.keep = True
        try:
            self.outputs({"input_ids": batch} if isinstance(batch, Tensor) else batch)
            return {name: q.seen for name, q in self._quantizers.items() if q.seen is not None}
        finally:
            for quantizer in self._quantizers.values():
                quantizer.keep, quantizer.seen = False, None

    def bind(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The graph's inputs by name, from the model's arguments."""
        return dict(zip(self.inputs, self.captured.bind(batch), strict=True))

    def _insert(self, schemes: SimulationSchemes) -> None:
        nodes = {node.name: node for node in self.graph_module.graph.nodes}
        placeholders = _node_of_placeholder(self._program, self.graph_module)
        for mark in self.marks:
            if mark.kind is Kind.BASE:
                continue
            node = placeholders.get(mark.node) or nodes[mark.node]
            if mark.kind is Kind.ACTIVATION:
                quantizer: nn.Module = Quantizer(mark.name, schemes.activations)
                self._quantizers[mark.name] = quantizer  # type: ignore[assignment]
            else:
                quantizer = self._weight_quantizer(mark, node, schemes.adapter_weights if mark.kind is Kind.ADAPTER else schemes.parameters)
            target = f"quantizer_{mark.node}"
            self.graph_module.add_submodule(target, quantizer)
            insert_after(node, partial(_call_module, target=target))
        self.graph_module.recompile()

    def _weight_quantizer(self, mark: Mark, node: Node, scheme: Scheme) -> nn.Module:
        weight = _attribute(self.graph_module, str(node.target)).detach()
        frozen = self._frozen.get(weight.data_ptr())
        if frozen is not None and frozen.value.shape == weight.shape:
            self._weight_encodings[mark.name] = frozen.encoding
            return frozen
        if weight.ndim < 2:
            scheme = Scheme(scheme.bitwidth, scheme.symmetric, PerTensor())
        try:
            encoding = measure(weight, scheme)
        except CalibrationError as error:
            raise CalibrationError(f"{mark.name}: {error}") from error
        self._weight_encodings[mark.name] = encoding
        self._frozen[weight.data_ptr()] = frozen = _FrozenWeight(weight, encoding)
        return frozen

    def _drop(self, name: str, reason: str) -> None:
        del self._quantizers[name]
        (mark,) = (m for m in self.marks if m.name == name)
        self.marks.remove(mark)
        node = next(n for n in self.graph_module.graph.nodes if n.op == "call_module" and n.target == f"quantizer_{mark.node}")
        node.replace_all_uses_with(node.args[0])
        self.graph_module.graph.erase_node(node)
        self.graph_module.delete_submodule(str(node.target))
        self.graph_module.recompile()
        self.explanation = [
            Placed(p.node, p.operator, p.module, p.module_class, Decision.FLOAT, reason) if p.node == mark.node else p for p in self.explanation
        ]

    def _set_mode(self, mode: Mode) -> None:
        for quantizer in self._quantizers.values():
            quantizer.mode = mode


class _FrozenWeight(nn.Module):
    """A weight on its grid, computed once: it no longer moves, and doing it anew in each forward costs more than the layer."""

    def __init__(self, weight: Tensor, encoding: Encoding):
        super().__init__()
        self.encoding = encoding
        self.value: Tensor
        self.register_buffer("value", encoding.fake_quantize(weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def _call_module(node: Node, target: str) -> Node:
    return node.graph.call_module(target, (node,))


def simulate(model: nn.Module, example_inputs: Mapping[str, Any], schemes: SimulationSchemes | None = None) -> Simulation:
    """Capture `model` (a frozen base, with or without an adapter) and place quantizers; see `capture` for the errors.

    Args:
        example_inputs: the model's keyword arguments, nested as the model takes them, with at least two tokens; see `capture`.
    """
    return Simulation(capture(model, example_inputs), schemes or SimulationSchemes(), base_encodings(model))


def base_encodings(model: nn.Module) -> dict[str, Encoding | FloatOffsetEncoding]:
    """The encoding of every packed weight of `model`, by the weight's name."""
    return {
        parameter_name(path): encoding
        for path, module in model.named_modules()
        if isinstance(encoding := getattr(module, "encoding", None), Encoding | FloatOffsetEncoding)
    }


def _same(a: Encoding | FloatOffsetEncoding, b: Encoding | FloatOffsetEncoding) -> bool:
    both = [e.minimum if isinstance(e, FloatOffsetEncoding) else e.offset for e in (a, b)]
    return a.scheme == b.scheme and torch.equal(a.scale, b.scale) and torch.equal(*both)


def _node_of_placeholder(program: ExportedProgram, module: GraphModule) -> dict[str, Node]:
    """In the module, parameters are attributes; find the attribute node of each placeholder of the program."""
    by_target = {str(n.target): n for n in module.graph.nodes if n.op == "get_attr"}
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    specs = {s.arg.name: s.target for s in program.graph_signature.input_specs if s.target is not None}
    found = {name: by_target[target] for name, target in specs.items() if target in by_target}
    return found | dict(zip(program.graph_signature.user_inputs, inputs, strict=True))


def _attribute(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), name)
    return tensor


def _named_inputs(marks: list[Mark], captured: Captured) -> list[Mark]:
    """Marks of inputs go by the inputs' names; what comes from a cache lies on the grid that it left on, and gets no second one."""
    interface = captured.interface
    names = dict(zip(captured.program.graph_signature.user_inputs, interface.inputs, strict=True))
    return [replace(mark, name=names.get(mark.node, mark.name)) for mark in marks if names.get(mark.node) not in interface.cached]
