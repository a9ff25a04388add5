"""A captured model with simulated integer arithmetic.

    simulation = simulate(model, example_inputs)      # capture, place quantizers, quantize weights
    simulation.calibrate(batches)                     # one float pass sets the activation ranges
    simulation(input_ids=ids, attention_mask=mask)    # what integer hardware computes

    base weights      packed integers, dequantized in the graph; their encodings never change
    other weights     the adapter's, and those that step 1 left float: on their grids from the start
    activations       calibrated: `observe` runs float batches through the graph and adds to the
                      statistics; `freeze` estimates encodings from all of them. Observations are
                      kept: more batches can follow, and another scheme needs no new data

The graph computes in float32 for bfloat16 and float16 models too (`graph/capturable_model.py`).
`load_simulation` reads what `Simulation.save` writes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.node import map_aggregate
from transformers import PreTrainedModel

from qwlora.adapter.attach import active_adapters
from qwlora.adapter.padded_adapters import padded_adapters
from qwlora.errors import CalibrationError, CaptureError, QwloraWarning, listed, suggestion
from qwlora.graph.call_arguments import arguments_of, as_arguments, check_token_ids
from qwlora.graph.capture import Captured, capture
from qwlora.graph.nodes import MASKS, base_name
from qwlora.graph.quantized_graph import GraphValue, Kind, QuantizedGraph
from qwlora.graph.value_traits import Decision
from qwlora.grid.encoding import Encoding
from qwlora.grid.scheme import as_estimator
from qwlora.nn.fingerprint import adapter_fingerprint, fingerprint
from qwlora.nn.frozen import assert_frozen
from qwlora.nn.packed_layer import packed_layers, unwrapped
from qwlora.simulation.fake_quantizer import (
    FrozenWeight,
    Mode,
    OtherArithmetic,
    Quantizer,
    estimate_encodings,
    grid_ends,
    insert_quantizers,
    remove_quantizers_,
)
from qwlora.simulation.placement import Placement, place
from qwlora.simulation.placement_rules import Schemes
from qwlora.simulation.saved_simulation import (
    SimulationSource,
    load_encodings,
    read_record,
    write_simulation,
)
from qwlora.simulation.simulated_model import SimulatedModel
from qwlora.system.device import CPU, device_of, moved
from qwlora.system.processes import gathered, is_mine
from qwlora.system.progress import Track, untracked

# Dicts of arguments, tensors or tuples of tensors, as a DataLoader yields them; see
# `graph/call_arguments.py`
Batches = Iterable[Any]

_MASK, _UNSEEN = "a mask: values beyond 1e30", "no calibration data reached it"
_RESTORED = "left float by the restored calibration"


@dataclass(frozen=True)
class CalibrationReport:
    """The amount of calibration data, and the activations that need attention.

    Args:
        tokens: number of attended positions; number of rows for inputs without tokens.
        constants: names of activations with a single value.
        unseen: names of activations that no data reached; they are float now.
        masks: names of activations that turned out to be masks; they are float now.
    """

    tokens: int
    batches: int
    constants: tuple[str, ...]
    unseen: tuple[str, ...]
    masks: tuple[str, ...]


class Simulation(nn.Module):
    """A captured model with simulated quantization. Call it like the model: arguments by name, or
    the first of `inputs` by position. It returns the model's result type.

    Args:
        captured: the graph of `origin.model`.
        frozen: quantized copies of float weights that simulations of the model share, by address.
            Those of this simulation are added.
        activation_encodings: see `simulate`.

    Attributes:
        placement: every value of the graph, and the rule that decided about it.
        base_encodings: encodings of the base's packed weights, by name.
        quantizers: quantizers of activations, by name.
        weights: quantizers of the adapter's weights and of other float weights, by name.

    Raises:
        CaptureError: two values would have the same name.
        CalibrationError: a weight is not finite, or see `place` and `simulate`.
    """

    def __init__(
        self,
        captured: Captured,
        origin: SimulationSource,
        frozen: dict[int, FrozenWeight] | None = None,
        activation_encodings: Mapping[str, Encoding] | None = None,
    ):
        super().__init__()
        self.captured, self.origin = captured, origin
        self.placement = place(captured.program, origin.schemes, captured.input_names)
        self.placement.exclude(
            captured.interface.cached,
            Decision.SHARE,
            "comes from the cache, on the grid of the output that filled it",
        )
        counts = Counter(mark.name for mark in self.marks)
        if duplicates := [name for name, count in counts.items() if count > 1]:
            raise CaptureError(
                f"two values would have the name {duplicates[0]}; activate one adapter at a time"
            )
        self.base_encodings = self.placement.base_encodings(origin.model)
        self.graph_module, self.quantizers, self.weights = insert_quantizers(
            captured.program, self.marks, origin.schemes, {} if frozen is None else frozen
        )
        self._tokens = self._batches = 0  # that `observe` has run
        known = activation_encodings or {}
        _refuse_unknown(known, self.placement.values)
        for name, quantizer in self.quantizers.items():
            if name in known:
                quantizer.encoding, quantizer.fixed = known[name], True

    @property
    def marks(self) -> list[GraphValue]:
        """The values that have an encoding, in graph order."""
        return self.placement.marks

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in order."""
        return self.captured.inputs

    @property
    def program(self) -> ExportedProgram:
        """The captured graph, without quantizers."""
        return self.captured.program

    def explain(self) -> Placement:
        """The placement log: which values are quantized, on which grid, and why. Weights and inputs
        come first."""
        values = sorted(self.placement.values, key=lambda value: value.is_computed)
        return Placement(self.placement.policy, [self._with_grid(value) for value in values])

    def _with_grid(self, value: GraphValue) -> GraphValue:
        if value.decision is not Decision.QUANTIZE:
            return value
        if (quantizer := self.quantizers.get(value.name)) is None:
            return replace(value, grid=str(self._weight_encodings[value.name].scheme))
        low, high = quantizer.minimum, quantizer.maximum
        if quantizer.encoding is not None:
            low, high = grid_ends(quantizer.encoding)
        grid, observer = str(quantizer.scheme), quantizer.estimator.name
        return replace(value, grid=grid, observer=observer, low=low, high=high)

    def forward(self, *first: Tensor, **arguments: Any) -> Any:
        """The model's result, simulated.

        Raises:
            CalibrationError: an activation has no encoding yet, outside of `only`. The same holds
                for every method that computes simulated values.
            CaptureError: see `Captured.bind`.
        """
        if len(first) > len(self.inputs):
            raise CaptureError(
                f"{len(first)} tensors are given by position, but there are {len(self.inputs)} "
                f"inputs ({', '.join(self.inputs)}). Give them by name"
            )
        arguments |= zip(self.inputs, first, strict=False)
        return self.captured.result_of(self.graph_module(*self._bound(arguments)))

    def calibrate(
        self,
        batches: Batches,
        track: Track = untracked,
        tokens: int | None = None,
        allow_unseen: bool = False,
    ) -> CalibrationReport:
        """`observe`, then `freeze`. If either raises, the simulation does not change."""
        with self.restored_on_error():
            self.observe(batches, track, tokens)
            return self.freeze(allow_unseen)

    def check_unchanged(self, base_fingerprint: str | None = None) -> None:
        """Refuse to calibrate or export if the base or the adapter has changed since `simulate`:
        weights would keep their old grids, and files would match neither old nor new adapter.

        Args:
            base_fingerprint: the base's current fingerprint, if known. Computing it takes 0.6 s for
                1 GB.

        Raises:
            CalibrationError: a fingerprint differs. An adapter that was removed from the model
                counts as unchanged: the simulation has its own copy.
        """
        model, adapters = self.origin.model, self.origin.adapters
        base, adapter = base_fingerprint or fingerprint(model), adapter_fingerprint(model, adapters)
        for part, now, before in (
            ("base", base, self.origin.base_fingerprint),
            (f"adapter {', '.join(adapters)}", adapter, self.origin.adapter_fingerprint),
        ):
            if now is not None and now != before:
                raise CalibrationError(
                    f"the {part} of {type(model).__name__} has changed since it was simulated (its "
                    f"fingerprint was {before}, and is {now}). Simulate it again (qwlora.simulate)"
                )

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """If the block raises, restore encodings, observations and modes of activations."""
        before = [(quantizer, dict(vars(quantizer))) for quantizer in self.quantizers.values()]
        counts = self._batches, self._tokens
        try:
            yield
        except BaseException:  # Ctrl-C too
            self._batches, self._tokens = counts
            for quantizer, attributes in before:
                vars(quantizer).update(attributes)
            raise

    def observe(
        self, batches: Batches, track: Track = untracked, tokens: int | None = None
    ) -> None:
        """Observe the activations of `batches`, and remove encodings; `freeze` sets new ones. If it
        raises, the simulation does not change.

        Args:
            batches: see `Batches`.
            tokens: stop after the batch that reaches this number of tokens.

        Raises:
            CalibrationError: there was no batch; or see `check_unchanged`.
        """
        self.check_unchanged()
        with self.restored_on_error():
            self.observe_unchecked(batches, track, tokens)

    @torch.no_grad()
    def observe_unchecked(self, batches: Batches, track: Track, tokens: int | None) -> None:
        """`observe` without `check_unchanged`. If it raises, quantizers are left observing."""
        # fixed ones keep quantizing: the base's grids affect the adapter's observed activations
        for quantizer in self.quantizers.values():
            quantizer.mode = Mode.SIMULATE
        observed = [q for q in self.quantizers.values() if not q.fixed]
        earlier = [quantizer.observe() for quantizer in observed]
        batch_count = token_count = 0
        total = len(batches) if isinstance(batches, Collection) else None
        for number, batch in enumerate(track(batches, "calibrating", total)):
            arguments = as_arguments(batch, self.inputs)
            check_token_ids(arguments, self.origin.model, CalibrationError)
            if is_mine(number):
                self.graph_module(*self._bound(arguments))
            batch_count += 1
            token_count += tokens_of(arguments)
            if tokens is not None and token_count >= tokens:
                break
        if not batch_count:
            raise CalibrationError("calibration needs at least one batch, but got none")
        parts = zip(*gathered([q.observer.to(CPU) for q in observed]), strict=True)
        for quantizer, before, of_all in zip(observed, earlier, parts, strict=True):
            for part in of_all:
                before.merge(part)
            quantizer.observer, quantizer.encoding, quantizer.mode = before, None, Mode.SIMULATE
        self._batches += batch_count
        self._tokens += token_count

    def freeze(self, allow_unseen: bool = False) -> CalibrationReport:
        """Set missing encodings from all observed data. If it raises, none is set.

        Masks are left float: values beyond 1e30, or infinite results of operators that apply masks,
        unless a rule fixed that end of the range.

        Args:
            allow_unseen: leave activations float that no data reached (an expert that no token
                chose) instead of raising an error.

        Raises:
            CalibrationError: an activation saw no data or non-finite values. The message names it.
        """
        operators = {value.name: base_name(value.operator) for value in self.marks}
        masks = [n for n, q in self.quantizers.items() if q.is_mask(operators[n] in MASKS)]
        unseen = [
            name
            for name, q in self.quantizers.items()
            if q.encoding is None and not q.observer.batches and not q.is_pinned
        ]
        if unseen and not allow_unseen:
            raise CalibrationError(
                f"{len(unseen)} activations saw no data: {listed(unseen, 3)}. Give other batches, "
                "add a rule with keep: float, or set allow_unseen=True (recipe: simulation.unseen: "
                "float)"
            )
        left_float = {*masks, *unseen}
        quantized = [q for name, q in self.quantizers.items() if name not in left_float]
        with self.restored_on_error():
            estimate_encodings([q for q in quantized if q.encoding is None])
        self._drop(masks, _MASK)
        self._drop(unseen, _UNSEEN)
        constants = tuple(name for name, q in self.quantizers.items() if q.is_constant)
        left = self._left_float(_UNSEEN), self._left_float(_MASK)
        return CalibrationReport(self._tokens, self._batches, constants, *left)

    @property
    def dropped(self) -> frozenset[str]:
        """Names of placed activations that calibration left float: masks and unseen values."""
        return frozenset(self._left_float(_MASK, _UNSEEN, _RESTORED))

    def _left_float(self, *reasons: str) -> tuple[str, ...]:
        return tuple(value.name for value in self.placement.values if value.reason in reasons)

    def _drop(self, names: Collection[str], reason: str) -> None:
        """Remove quantizers from the graph, with the reason in the placement log."""
        if names:
            for name in names:
                del self.quantizers[name]
            remove_quantizers_(self.graph_module, [m.node for m in self.marks if m.name in names])
            self.placement.exclude(names, Decision.FLOAT, reason)

    @contextmanager
    def only(self, *matches: str) -> Iterator[None]:
        """Within, quantize only activations and weights whose name matches a glob.

        Without globs nothing is quantized, except packed base weights, which always are.

        Raises:
            CalibrationError: a glob matches nothing.
        """
        modules: dict[str, Quantizer | FrozenWeight] = {**self.weights, **self.quantizers}
        on = set[int]()  # by id: tied weights share a module
        for match in matches:
            matched = [name for name in modules if fnmatchcase(name, match)]
            if not matched:
                raise CalibrationError(
                    f"{match!r} matches no quantized value{suggestion(match, list(modules), 3)}"
                )
            on.update(id(modules[name]) for name in matched)
        before = [(module, module.mode) for module in modules.values()]
        for module in modules.values():
            module.mode = Mode.SIMULATE if id(module) in on else Mode.FLOAT
        try:
            yield
        finally:
            for module, mode in before:
                module.mode = mode

    @property
    def encodings(self) -> dict[str, Encoding]:
        """All encodings by name, in graph order; base weights included.

        Raises:
            CalibrationError: before `calibrate`.
        """
        known = self._weight_encodings | self.activation_encodings
        return {mark.name: known[mark.name] for mark in self.marks}

    @property
    def activation_encodings(self) -> dict[str, Encoding]:
        """Encodings of the activations by name. Those of a base without an adapter can be given to
        `simulate` for an adapter on this base.

        Raises:
            CalibrationError: before `calibrate`.
        """
        return {name: q.known_encoding() for name, q in self.quantizers.items()}

    @property
    def _weight_encodings(self) -> dict[str, Encoding]:
        return {**self.base_encodings, **{n: w.encoding for n, w in self.weights.items()}}

    @property
    def adapter_weights(self) -> dict[str, Tensor]:
        """The float weights of the adapter, by name."""
        targets = self.program.graph_signature.inputs_to_parameters
        return {
            mark.name: self.graph_module.get_parameter(targets[mark.node]).detach()
            for mark in self.marks
            if mark.kind is Kind.ADAPTER
        }

    def set_adapter_encodings(self, encodings: Mapping[str, Encoding]) -> None:
        """Quantize adapter weights on these grids instead of the measured ones. Ignores other
        names."""
        nodes = {mark.name: mark.node for mark in self.marks}
        for name, weight in self.adapter_weights.items():
            if name in encodings and not self.weights[name].encoding.has_same_grid(encodings[name]):
                encoding = encodings[name].to(weight.device)
                self.weights[name] = FrozenWeight(weight, encoding)
                self.graph_module.add_submodule(f"quantizer_{nodes[name]}", self.weights[name])

    def restore(self, encodings: Mapping[str, Encoding], dropped: Collection[str] = ()) -> None:
        """Use the encodings of an earlier calibration.

        Args:
            encodings: encodings of all values, weights included.
            dropped: activations that calibration left float, see `Simulation.dropped`.

        Raises:
            CalibrationError: an encoding has no value in this graph, a weight's encoding is not
                the one measured from its values, or an activation has no encoding.
        """
        _refuse_unknown(encodings, self.marks)
        for name, encoding in self._weight_encodings.items():
            if name not in encodings or not encoding.has_same_grid(encodings[name]):
                raise CalibrationError(
                    f"the encoding of {name} does not match the weight's values. Calibrate again"
                )
        left = [name for name in self.quantizers if name not in encodings]
        if missing := [name for name in left if name not in dropped]:
            raise CalibrationError(
                f"{len(missing)} activations have no encoding, {missing[0]} first: the encodings "
                "belong to another placement. Calibrate again, or name the values that calibration "
                "left float: dropped=other.dropped"
            )
        self._drop(left, _RESTORED)
        for name, quantizer in self.quantizers.items():
            quantizer.encoding = encodings[name]

    def restore_from(self, folder: str | Path, adapter_weights: bool = True) -> None:
        """`restore` the encodings in the folder of a simulation of the same base and adapter."""
        encodings = load_encodings(Path(folder))
        # shared encodings cannot be computed from this adapter's weights alone
        if adapter_weights:
            self.set_adapter_encodings(encodings)
        self.restore({**self.base_encodings, **encodings}, read_record(Path(folder)).dropped)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device; the captured model stays where it is."""
        moved = fn(torch.empty(0))
        if moved.dtype != torch.float32:
            raise CaptureError(
                "A simulation cannot be cast: its graph computes in float32, for models in half "
                "precision too. Only its device can be changed, with to(device)"
            )
        # Moved parameters become new objects, because the model's parameters stay where they are.
        # Tied parameters stay tied.
        copies: dict[int, nn.Parameter] = {}
        for module in self.graph_module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.device != moved.device:
                    copied = nn.Parameter(parameter.detach(), parameter.requires_grad)
                    module._parameters[name] = copies.setdefault(id(parameter), copied)
        super()._apply(fn, recurse)
        for node in self.graph_module.graph.nodes:  # such as arange(..., device=cpu)
            node.args, node.kwargs = map_aggregate(
                (node.args, node.kwargs),
                lambda v: moved.device if isinstance(v, torch.device) else v,
            )
        self.graph_module.recompile()
        return self

    def graph(self) -> QuantizedGraph:
        """The graph and its encodings, for an exporter."""
        observer = as_estimator(self.origin.schemes.observer).name
        interface = self.captured.interface
        return QuantizedGraph(self.program, interface, tuple(self.marks), self.encodings, observer)

    def logits(self, ids: Tensor) -> Tensor:
        """The simulated primary output for unpadded ids [batch, tokens]."""
        return self.outputs({"input_ids": ids})[self.captured.interface.primary]

    def outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every simulated output by name."""
        with torch.no_grad():
            return self.captured.named(self.graph_module(*self._bound(batch)))

    def primary(self, batch: Mapping[str, Any]) -> Tensor:
        """The primary output, with gradients where they are enabled."""
        outputs = self.captured.named(self.graph_module(*self._bound(batch)))
        return outputs[self.captured.interface.primary]

    def perturbed_outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`outputs` with other, equally valid float32 arithmetic: `x * (1 / scale)` instead of
        `x / scale`, and every matrix product summed in two halves.

        Runtimes differ in both. The distance to `outputs` is the noise floor of a comparison
        between two correct runtimes (docs/log/simulation.md).
        """
        run = OtherArithmetic(self.graph_module).run
        with torch.no_grad():
            return self.captured.named(run(*self._bound(batch)))

    def values(self, batch: Tensor | Mapping[str, Any]) -> dict[str, Tensor]:
        """Every quantized activation of one simulated forward, by name.

        Args:
            batch: the model's arguments, or unpadded ids [batch, tokens].
        """
        recorded: dict[str, Tensor] = {}

        # a copy, because later operators may overwrite the value
        def record(quantizer: nn.Module, _: Any, value: Tensor) -> None:
            recorded[str(quantizer.name)] = value.clone()

        with ExitStack() as stack:
            for quantizer in self.quantizers.values():
                stack.enter_context(quantizer.register_forward_hook(record))
            self.outputs({"input_ids": batch} if isinstance(batch, Tensor) else batch)
        return recorded

    def bind(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The graph's inputs by name, from the model's arguments."""
        return dict(zip(self.inputs, self._bound(batch), strict=True))

    def _bound(self, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return moved(self.captured.bind(batch), device_of(self.graph_module))

    def as_model(self) -> SimulatedModel:
        """The simulation with the interface of a transformers model.

        Raises:
            CalibrationError: an activation has no encoding yet.
            CaptureError: the model is not from transformers.
        """
        self.encodings  # noqa: B018 (raises if not calibrated)
        model = self.origin.model
        like = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(like, PreTrainedModel):
            raise CaptureError(
                f"{type(like).__name__} is not a transformers model; call the simulation with "
                "tensors instead"
            )
        return SimulatedModel(self, like)

    def save(self, folder: str | Path) -> None:
        """Write the simulation to `folder`; see `saved_simulation.py` and `check_unchanged`."""
        self.check_unchanged()
        encodings = {n: e for n, e in self.encodings.items() if n not in self.base_encodings}
        write_simulation(Path(folder), self.origin, self.explain(), encodings, self.dropped)

    def __repr__(self) -> str:
        kinds = Counter(mark.kind for mark in self.marks)
        missing = sum(quantizer.encoding is None for quantizer in self.quantizers.values())
        return (
            f"Simulation of {type(self.origin.model).__name__}: "
            f"{kinds[Kind.BASE]:,} base weights, {kinds[Kind.ADAPTER]:,} adapter weights, "
            f"{kinds[Kind.PARAMETER]:,} other parameters, {kinds[Kind.ACTIVATION]:,} activations; "
            + (f"{missing:,} not calibrated" if missing else "calibrated")
        )


def simulate(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Tensor | Sequence[Tensor],
    schemes: Schemes | None = None,
    activation_encodings: Mapping[str, Encoding] | None = None,
    ranks: Mapping[str, int] | None = None,
) -> Simulation:
    """Capture `model` (a frozen base, with or without an adapter) and place quantizers.

    Args:
        example_inputs: the model's keyword arguments, with at least two tokens; see `capture`. Or
            its first arguments: a tensor, or a tuple of tensors.
        schemes: grids, placement policy and rules. Default: `Schemes()`.
        activation_encodings: encodings of the same base, calibrated without an adapter
            (`Simulation.activation_encodings`). `observe` quantizes these activations and observes
            the adapter's; `freeze` does not change them. Activations that the policy leaves float
            stay float.
        ranks: ranks to pad the active adapter to, by path of the layer, as `simulate_adapters` does
            for adapters that share all encodings (`adapter/padded_adapters.py`). Default: its own.

    Returns:
        A simulation with quantized weights and no activation encodings; call `calibrate` next.

    Raises:
        CaptureError: see `capture`; or the graph uses no packed layer although the model has some.
        CalibrationError: a weight is not finite, `activation_encodings` has a name that the graph
            lacks, or see `place`.
    """
    model = unwrapped(model)
    example = example_arguments(model, example_inputs)
    schemes = schemes or Schemes()
    packed = packed_layers(model)
    if packed:
        assert_frozen(model)
    elif any(parameter.ndim > 1 for parameter in model.parameters()):
        warnings.warn(
            f"{type(model).__name__} has no packed layer, so the simulation has no base encodings: "
            f"all weights get the grid of Schemes.parameters ({schemes.parameters}). "
            "To simulate integer weights, call qwlora.quantize_ first",
            QwloraWarning,
            stacklevel=2,
        )
    source = SimulationSource.of(model, example, schemes, ranks)
    with padded_adapters(model, active_adapters(model), source.ranks):
        captured = capture(model, example)
    simulation = Simulation(captured, source, activation_encodings=activation_encodings)
    if packed and not simulation.base_encodings:
        raise CaptureError(
            f"the captured graph uses none of the {len(packed)} packed layers of "
            f"{type(model).__name__}, {next(iter(packed))} first: something computes other weights "
            "in their place. Remove patched forwards, or pass inputs that reach these layers"
        )
    return simulation


def example_arguments(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """The example inputs of `simulate` by argument name. Raises CaptureError for other forms."""
    arguments = as_arguments(example_inputs, arguments_of(model), "example_inputs")
    check_token_ids(arguments, model, CaptureError)
    return arguments


def _refuse_unknown(encodings: Iterable[str], values: Iterable[GraphValue]) -> None:
    known = {value.name for value in values}
    if unknown := [name for name in encodings if name not in known]:
        raise CalibrationError(
            f"{len(unknown)} encodings have no value in the graph: {listed(unknown, 3)}. "
            "Calibrate again"
        )


def tokens_of(batch: Mapping[str, Any]) -> int:
    """Number of attended positions in a batch; rows if it has neither a mask nor token ids."""
    if isinstance(mask := batch.get("attention_mask"), Tensor) and mask.ndim == 2:
        return int((mask != 0).sum())
    if isinstance(ids := batch.get("input_ids"), Tensor):
        return ids.numel()
    return next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)
