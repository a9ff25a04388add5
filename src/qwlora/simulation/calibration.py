"""Calibration of activations: observe data, then set the encodings.

    observe(batches)      run float batches through the graph; further calls add to the statistics
    freeze()              estimate encodings from all observed data
    calibrate(batches)    both

Observations are kept: more batches can follow, and another scheme needs no new data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qwlora.errors import CalibrationError
from qwlora.graph.aten_ops import MASKS, base_name
from qwlora.graph.call_arguments import as_arguments, check_token_ids
from qwlora.graph.move_graph import device_of, moved_encoding
from qwlora.graph.quantized_graph import Mark
from qwlora.grid.encoding import Encoding
from qwlora.messages import listed, suggestion
from qwlora.progress import Track, untracked
from qwlora.simulation.estimate_encodings import estimate_encodings
from qwlora.simulation.fake_quantizer import FrozenWeight, Mode, Quantizer
from qwlora.simulation.placement import Placed, Placement
from qwlora.simulation.placement_rules import Decision


@dataclass(frozen=True)
class CalibrationReport:
    """The data of a calibration, and values that are special.

    Args:
        tokens: attended positions; rows, for inputs without tokens.
        constants: values with the same number everywhere.
        unseen: values that no data reached; they are float now.
        masks: values that turned out to be masks; they are float now.
    """

    tokens: int
    batches: int
    constants: tuple[str, ...]
    unseen: tuple[str, ...]
    masks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# Calibration data by callback: it calls the model that it gets with each batch.
Callback = Callable[[Callable[..., Sequence[Tensor]]], Any]

_NO_BATCH = "calibration needs at least one batch, but got none"


@dataclass
class _Counts:
    """How much data `observe` has run."""

    tokens: int = 0
    batches: int = 0


class CalibratedGraph(nn.Module):
    """A captured graph with quantizers that are calibrated.

    Attributes:
        quantizers: of activations, by name.
        weights: float weights on their grids (the adapter's, and what step 1 left float), by name.
    """

    marks: list[Mark]
    explanation: list[Placed]
    placement: Placement
    graph_module: GraphModule
    origin: Any  # see SimulatedGraph

    def __init__(self) -> None:
        super().__init__()
        self.quantizers: dict[str, Quantizer] = {}
        self.weights: dict[str, FrozenWeight] = {}
        self._counts = _Counts()
        self._chosen = 0  # depth of nested `only` contexts
        self._dropped: set[str] = set()
        self._masks: list[str] = []
        self._unseen: list[str] = []

    def calibrate(
        self,
        batches: Iterable[Any] | Callback,
        track: Track = untracked,
        tokens: int | None = None,
        allow_unseen: bool = False,
    ) -> CalibrationReport:
        """`observe`, then `freeze`. Needs at least one batch, whatever was observed before."""
        if isinstance(batches, Collection) and not batches:
            raise CalibrationError(_NO_BATCH)
        before = self._counts.batches
        self.observe(batches, track, tokens)
        if self._counts.batches == before:
            raise CalibrationError(_NO_BATCH)
        return self.freeze(allow_unseen)

    @torch.no_grad()
    def observe(
        self,
        batches: Iterable[Any] | Callback,
        track: Track = untracked,
        tokens: int | None = None,
    ) -> None:
        """Observe the activations of `batches`, and remove encodings; `freeze` sets new ones.

        Args:
            batches: dicts of arguments, tensors or tuples of tensors, as a DataLoader yields them;
                see `graph/call_arguments.py`. Or a callback, as AIMET's `compute_encodings` takes
                it: it gets a model, and calls it with each batch.
            tokens: stop after the batch that reaches this number of tokens; not with a callback.

        Raises:
            CalibrationError: there was no batch.
        """
        if self._counts.batches == 0 and isinstance(batches, Collection) and not batches:
            raise CalibrationError(_NO_BATCH)
        for quantizer in self.quantizers.values():
            quantizer.mode = Mode.SIMULATE if quantizer.fixed else Mode.OBSERVE
        before = self._counts.tokens
        try:
            if callable(batches):
                batches(self._observe_call)
            else:
                total = len(batches) if isinstance(batches, Collection) else None
                for batch in track(batches, "calibrating", total):
                    self._observe_batch(batch)
                    if tokens is not None and self._counts.tokens - before >= tokens:
                        break
        finally:
            self._set_mode(Mode.FLOAT)
        for quantizer in self.quantizers.values():
            if not quantizer.fixed:
                quantizer.encoding = None

    def _observe_call(self, *inputs: Any, **arguments: Any) -> Sequence[Tensor]:
        """What a callback gets as its model."""
        if inputs and arguments:
            raise CalibrationError(
                "a callback called the model with positional and keyword arguments; give it all "
                "of them by name"
            )
        return self._observe_batch(arguments or (inputs[0] if len(inputs) == 1 else inputs))

    def _observe_batch(self, batch: Any) -> Sequence[Tensor]:
        batch = as_arguments(batch, self.inputs)
        check_token_ids(batch, self.origin.model, CalibrationError)
        outputs = self._run(batch)
        self._counts.batches += 1
        self._counts.tokens += tokens_of(batch)
        return outputs

    def fix_encodings(self, encodings: Mapping[str, Encoding]) -> None:
        """Use activation encodings of another simulation of the same base.

        `observe` simulates these activations and observes the others; `freeze` does not change
        them. Activations that the policy leaves float here stay float.

        Raises:
            CalibrationError: an encoding has no value in this graph.
        """
        known = {placed.name for placed in (*self.placement.weights, *self.explanation)}
        unknown = [name for name in encodings if name not in known]
        if unknown:
            raise CalibrationError(
                f"{len(unknown)} encodings have no activation in the graph: "
                f"{listed(unknown, 3)}. Calibrate the base again"
            )
        for name, quantizer in self.quantizers.items():
            encoding = encodings.get(name)
            if encoding is not None:
                quantizer.scheme = encoding.scheme
                quantizer.encoding, quantizer.fixed = encoding, True
        self._place_encodings()

    def freeze(self, allow_unseen: bool = False) -> CalibrationReport:
        """Set missing encodings from all observed data, and simulate from now on.

        Masks are left float: values beyond 1e30, or infinite results of operators that apply masks,
        unless a rule fixed that end of the range.

        Args:
            allow_unseen: leave a value float that no data reached (an expert that no token chose)
                instead of raising an error.

        Raises:
            CalibrationError: nothing was observed; or an activation saw no data or non-finite
                values. The message names it.
        """
        if not self._counts.batches and any(
            q.encoding is None and not q.is_pinned for q in self.quantizers.values()
        ):
            raise CalibrationError("calibration needs at least one batch, but nothing was observed")
        operators = {p.node: p.operator for p in self.explanation}
        nodes = {mark.name: mark.node for mark in self.marks}
        for name, quantizer in list(self.quantizers.items()):
            if quantizer.is_mask and (
                not quantizer.is_infinite or base_name(operators.get(nodes[name], "")) in MASKS
            ):
                self._drop(name, "a mask: values beyond 1e30")
                self._masks.append(name)
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
        for name in unseen:
            self._drop(name, "no calibration data reached it")
        self._unseen += unseen
        estimate_encodings([q for q in self.quantizers.values() if q.encoding is None])
        self._place_encodings()
        self._set_mode(Mode.SIMULATE)
        constants = tuple(name for name, q in self.quantizers.items() if q.is_constant)
        return CalibrationReport(
            self._counts.tokens,
            self._counts.batches,
            constants,
            tuple(self._unseen),
            tuple(self._masks),
        )

    @property
    def dropped(self) -> frozenset[str]:
        """Names of placed activations that calibration left float: masks and unseen values."""
        return frozenset(self._dropped)

    @contextmanager
    def only(self, *matches: str) -> Iterator[None]:
        """Within, quantize only activations and weights whose name matches a glob.

        Without globs nothing is quantized, except packed base weights, which always are.

        Raises:
            CalibrationError: a glob matches nothing.
        """
        modules: dict[str, Quantizer | FrozenWeight] = {**self.weights, **self.quantizers}
        wanted = {name for match in matches for name in self._matching(match, modules)}
        on = {id(modules[name]) for name in wanted}  # tied weights share a module
        before = {name: module.mode for name, module in modules.items()}
        try:
            for module in modules.values():
                module.mode = Mode.SIMULATE if id(module) in on else Mode.FLOAT
            self._chosen += 1
            try:
                yield
            finally:
                self._chosen -= 1
        finally:
            for name, module in modules.items():
                module.mode = before[name]

    def _refuse_uncalibrated(self) -> None:
        missing = [
            name for name, quantizer in self.quantizers.items() if quantizer.encoding is None
        ]
        if missing:
            raise CalibrationError(
                f"{len(missing)} activations have no encoding yet, {missing[0]} first; call "
                "calibrate, or freeze after observe. To compute with float activations, use "
                "`with simulation.only():`"
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in order."""
        raise NotImplementedError

    def _run(self, batch: Mapping[str, Any]) -> Sequence[Tensor]:
        """One forward of the graph on one batch."""
        raise NotImplementedError

    def _matching(self, match: str, modules: Mapping[str, Any]) -> list[str]:
        names = [name for name in modules if fnmatchcase(name, match)]
        if not names:
            raise CalibrationError(
                f"{match!r} matches no quantized value{suggestion(match, list(modules), 3)}"
            )
        return names

    def _drop(self, name: str, reason: str) -> None:
        """Remove a quantizer from the graph, with the reason in the placement log."""
        del self.quantizers[name]
        self._dropped.add(name)
        (mark,) = (m for m in self.marks if m.name == name)
        self.placement.exclude({name}, Decision.FLOAT, reason)
        node = next(
            n
            for n in self.graph_module.graph.nodes
            if n.op == "call_module" and n.target == f"quantizer_{mark.node}"
        )
        node.replace_all_uses_with(node.args[0])
        self.graph_module.graph.erase_node(node)
        self.graph_module.delete_submodule(str(node.target))
        self.graph_module.recompile()

    def _place_encodings(self, device: torch.device | None = None) -> None:
        """Move activation encodings to the device of the graph, or to `device`."""
        device = device or device_of(self.graph_module)
        for quantizer in self.quantizers.values():
            if quantizer.encoding is not None:
                quantizer.encoding = moved_encoding(quantizer.encoding, device)

    def _set_mode(self, mode: Mode) -> None:
        for quantizer in self.quantizers.values():
            quantizer.mode = mode


def tokens_of(batch: Mapping[str, Any]) -> int:
    """Attended positions of a batch; its rows, if it has neither a mask nor token ids."""
    if isinstance(mask := batch.get("attention_mask"), Tensor) and mask.ndim == 2:
        return int((mask != 0).sum())
    if isinstance(ids := batch.get("input_ids"), Tensor):
        return ids.numel()
    first: Sequence[Tensor] = [
        value for value in batch.values() if isinstance(value, Tensor) and value.ndim
    ]
    return len(first[0]) if first else 1
