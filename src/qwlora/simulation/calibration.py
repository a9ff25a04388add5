"""Calibration: observe activations, then fix their encodings.

    observe(batches)      every quantizer takes in what passes it; may be called again, and goes on
    freeze()              encodings from what was observed so far
    calibrate(batches)    both

What was observed stays. So another scheme (`set_scheme`) needs no data, several processes can share the work (`observations`, `take_in`, `merge`), and more
batches can follow. `only` switches quantizers off and on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qwlora.errors import CalibrationError
from qwlora.graph.aten_ops import MASKS, base_name
from qwlora.graph.call_arguments import as_arguments
from qwlora.graph.move_graph import device_of, moved_encoding
from qwlora.graph.quantized_graph import Mark
from qwlora.grid.activation_observer import SampleObserver
from qwlora.grid.encoding import Encoding
from qwlora.grid.scheme import Scheme
from qwlora.messages import listed, suggestion
from qwlora.progress import Track, untracked
from qwlora.simulation.estimate_encodings import estimate
from qwlora.simulation.fake_quantizer import FrozenWeight, Mode, Quantizer
from qwlora.simulation.placement import Placed, Placement
from qwlora.simulation.placement_rules import Decision


@dataclass(frozen=True)
class Stillness:
    """When to stop before the data ends: no range has moved by more than `share` of its width for `batches` batches in a row."""

    share: float = 0.01
    batches: int = 4

    def __post_init__(self) -> None:
        if not self.share >= 0 or self.batches < 1:
            raise CalibrationError(
                f"ranges stand still by a share of at least 0 for at least 1 batch, not {self.share} and {self.batches}"
            )


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration saw.

    Args:
        tokens: positions that are attended to; of inputs without tokens, rows.
        constants: values that were the same number everywhere.
        unseen: values that no number came by for; they are float now.
        masks: values that were found to be masks, and are float now.
        stopped_early: ranges stood still before the data ended.
    """

    tokens: int
    batches: int
    constants: tuple[str, ...]
    unseen: tuple[str, ...]
    masks: tuple[str, ...]
    stopped_early: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_NO_BATCH = "calibration needs at least one batch, and none was given"


@dataclass
class _Seen:
    """What `observe` has counted."""

    tokens: int = 0
    batches: int = 0
    stopped_early: bool = False


class Calibrated(nn.Module):
    """A captured graph whose quantizers are calibrated; `Simulation` is one.

    Attributes:
        quantizers: those of activations, by name.
        weights: those of weights that step 1 left float, and of the adapter's, by name.
    """

    marks: list[Mark]
    explanation: list[Placed]
    placement: Placement
    graph_module: GraphModule

    def __init__(self) -> None:
        super().__init__()
        self.quantizers: dict[str, Quantizer] = {}
        self.weights: dict[str, FrozenWeight] = {}
        self._seen = _Seen()
        self._chosen = 0  # how many `only` are open
        self._dropped: set[str] = set()
        self._masks: list[str] = []
        self._unseen: list[str] = []

    def calibrate(
        self,
        batches: Iterable[Any],
        track: Track = untracked,
        tokens: int | None = None,
        stillness: Stillness | None = None,
        allow_unseen: bool = False,
    ) -> CalibrationReport:
        """`observe`, then `freeze`; see these. Without a batch it is an error, whatever was observed before."""
        if isinstance(batches, Collection) and not batches:
            raise CalibrationError(_NO_BATCH)
        before = self._seen.batches
        self.observe(batches, track, tokens, stillness)
        if self._seen.batches == before:
            raise CalibrationError(_NO_BATCH)
        return self.freeze(allow_unseen)

    @torch.no_grad()
    def observe(
        self,
        batches: Iterable[Any],
        track: Track = untracked,
        tokens: int | None = None,
        stillness: Stillness | None = None,
    ) -> None:
        """Take in the activations of `batches`. The encodings of before are forgotten; call `freeze` for new ones.

        Args:
            batches: dicts of arguments, tensors or tuples of tensors, as a DataLoader gives them; see
                `call_arguments.py`.
            tokens: go no further than the batch in which this many have come by in this call; a batch is taken whole.
            stillness: stop when ranges stand still.

        Raises:
            CalibrationError: there was no batch.
        """
        if self._seen.batches == 0 and isinstance(batches, Collection) and not batches:
            raise CalibrationError(_NO_BATCH)
        for quantizer in self.quantizers.values():
            quantizer.mode = Mode.SIMULATE if quantizer.fixed else Mode.OBSERVE
        self._seen.stopped_early = False
        watch = _Watch(stillness) if stillness is not None else None
        before = self._seen.tokens
        try:
            for batch in track(
                batches, "calibrating", len(batches) if isinstance(batches, Collection) else None
            ):
                batch = as_arguments(batch, self.inputs)
                self._run(batch)
                self._seen.batches += 1
                self._seen.tokens += tokens_of(batch)
                if tokens is not None and self._seen.tokens - before >= tokens:
                    break
                if watch is not None and watch.is_still(self.quantizers):
                    self._seen.stopped_early = True
                    break
        finally:
            self._set_mode(Mode.FLOAT)
        for quantizer in self.quantizers.values():
            if not quantizer.fixed:
                quantizer.encoding = None

    def take_over(self, encodings: Mapping[str, Encoding]) -> None:
        """Take activation encodings from a simulation of the same base: `observe` simulates these values and takes in the others, and `freeze` leaves them.

        A value that the policy leaves float here stays float: of a layer with an adapter, say, matrix products may read the sum alone.

        Raises:
            CalibrationError: an encoding names no value of this graph.
        """
        known = {placed.name for placed in (*self.placement.weights, *self.explanation)}
        if strangers := [name for name in encodings if name not in known]:
            raise CalibrationError(
                f"encodings name activations that the graph does not have: {listed(strangers, 3)}; calibrate the base again"
            )
        for name, quantizer in self.quantizers.items():
            if (encoding := encodings.get(name)) is None:
                continue
            quantizer.scheme, quantizer.encoding, quantizer.fixed = encoding.scheme, encoding, True
        self._place_encodings()

    def freeze(self, allow_unseen: bool = False) -> CalibrationReport:
        """Fix the encodings of what has none, from everything observed, and simulate from now on.

        Values that only a mask can hold (beyond 1e30; infinite ones, where an operator made them that combines with masks) lose their quantizer, and
        `explanation` says so. An end of a range that a rule fixed is the rule's business.

        Args:
            allow_unseen: a value that no number came by for (an expert that no token chose) stays float; otherwise it is an error.

        Raises:
            CalibrationError: nothing was observed; or an activation saw no data, or is not finite: the message names it.
        """
        if not self._seen.batches and any(
            q.encoding is None and not q.is_pinned for q in self.quantizers.values()
        ):
            raise CalibrationError("calibration needs at least one batch: nothing was observed")
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
                f"{len(unseen)} activations saw no data: {listed(unseen, 3)}; "
                "give other batches, keep them float by a rule, or allow_unseen=True"
            )
        for name in unseen:
            self._drop(name, "no data came by in calibration")
        self._unseen += unseen
        estimate([q for q in self.quantizers.values() if q.encoding is None])
        self._place_encodings()
        self._set_mode(Mode.SIMULATE)
        constants = tuple(name for name, q in self.quantizers.items() if q.is_constant)
        seen = self._seen
        return CalibrationReport(
            seen.tokens,
            seen.batches,
            constants,
            tuple(self._unseen),
            tuple(self._masks),
            seen.stopped_early,
        )

    @property
    def dropped(self) -> frozenset[str]:
        """Names of the activations that calibration left float, although placement gave them a quantizer: masks, and values that no data came by for."""
        return frozenset(self._dropped)

    def observations(self) -> dict[str, Tensor]:
        """Everything that was observed, as tensors: a safetensors file holds them, another process takes them in."""
        tensors = {
            f"{name}.{part}": t
            for name, q in self.quantizers.items()
            for part, t in q.observer.to_tensors().items()
        }
        return {**tensors, "seen": torch.tensor([self._seen.tokens, self._seen.batches])}

    def take_in(self, observations: Mapping[str, Tensor]) -> None:
        """Add what another process observed, as if it came after; exact for the ends of ranges. Call `freeze` for encodings; those taken over stay.

        Raises:
            CalibrationError: they are of another graph or placement, or kept no sample where this simulation needs one.
        """
        theirs: dict[str, dict[str, Tensor]] = {}
        for key, tensor in observations.items():
            name, dot, part = key.rpartition(".")
            if dot:
                theirs.setdefault(name, {})[part] = tensor
        if "seen" not in observations or (
            strangers := [n for n in theirs if n not in self.quantizers and n not in self._dropped]
        ):
            what = (
                f"name values that this graph does not quantize: {listed(strangers, 3)}"
                if "seen" in observations
                else "do not say how much was seen"
            )
            raise CalibrationError(
                f"these observations {what}; they belong to another model or placement"
            )
        for name, quantizer in self.quantizers.items():
            if name not in theirs or quantizer.fixed:
                continue
            try:
                quantizer.observer.merge(SampleObserver.from_tensors(theirs[name]))
            except (CalibrationError, KeyError, ValueError) as error:
                raise CalibrationError(f"{name}: {error}") from error
            quantizer.encoding = None
        tokens, batches = observations["seen"].tolist()
        self._seen = replace(
            self._seen, tokens=self._seen.tokens + tokens, batches=self._seen.batches + batches
        )
        self._set_mode(Mode.FLOAT)

    def merge(self, other: Calibrated) -> None:
        """Add what `other`, another simulation of this graph, observed; see `take_in`."""
        self.take_in(other.observations())

    def set_scheme(self, match: str, scheme: Scheme) -> list[str]:
        """Ask for another grid of the activations whose name matches a glob; `freeze` makes it, from what was observed.

        Returns:
            their names; encodings that were taken over stay as they are.

        Raises:
            CalibrationError: none matches but such, or the scheme has several scales.
        """
        matching = self._matching(match, self.quantizers)
        names = [name for name in matching if not self.quantizers[name].fixed]
        if not names:
            raise CalibrationError(
                f"{match!r} matches only activations whose encodings were taken over, {matching[0]} the first: their grids stay as they are"
            )
        for name in names:
            self.quantizers[name].scheme = scheme
        return names

    @contextmanager
    def only(self, *matches: str) -> Iterator[None]:
        """For a while, quantize only the activations and weights whose name matches a glob; the rest stays float. Without globs, nothing is quantized.

        Base weights are integers in the graph, and stay so.

        Raises:
            CalibrationError: a glob matches nothing.
        """
        modules: dict[str, Quantizer | FrozenWeight] = {**self.weights, **self.quantizers}
        wanted = {name for match in matches for name in self._matching(match, modules)}
        on = {id(modules[name]) for name in wanted}  # a tied weight has several names
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
                f"{len(missing)} activations have no encoding yet, {missing[0]} first; call calibrate, or freeze. With float activations it computes "
                "inside `with simulation.only():`"
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
                f"{match!r} matches nothing that is quantized{suggestion(match, list(modules), 3)}"
            )
        return names

    def _drop(self, name: str, reason: str) -> None:
        """Take a quantizer out of the graph; `explanation` says why."""
        del self.quantizers[name]
        self._dropped.add(name)
        (mark,) = (m for m in self.marks if m.name == name)
        self.placement.take_out({name}, Decision.FLOAT, reason)
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
        """Put the encodings of activations where the graph is, or is now."""
        device = device or device_of(self.graph_module)
        for quantizer in self.quantizers.values():
            if quantizer.encoding is not None:
                quantizer.encoding = moved_encoding(quantizer.encoding, device)

    def _set_mode(self, mode: Mode) -> None:
        for quantizer in self.quantizers.values():
            quantizer.mode = mode


class _Watch:
    """Sees whether ranges stand still."""

    def __init__(self, stillness: Stillness):
        self.stillness = stillness
        self.before: dict[str, tuple[float, float]] = {}
        self.still = 0

    def is_still(self, quantizers: Mapping[str, Quantizer]) -> bool:
        """To be asked after every batch."""
        names = [name for name, q in quantizers.items() if q.observer.batches and not q.is_pinned]
        lows = (
            torch.stack(
                [low for name in names if (low := quantizers[name].observer.low) is not None]
            ).tolist()
            if names
            else []
        )
        highs = (
            torch.stack(
                [high for name in names if (high := quantizers[name].observer.high) is not None]
            ).tolist()
            if names
            else []
        )
        now = {name: (low, high) for name, low, high in zip(names, lows, highs, strict=True)}
        moved = any(self._moved(self.before.get(name), *ends) for name, ends in now.items())
        self.before = now
        self.still = 0 if moved else self.still + 1
        return self.still >= self.stillness.batches

    def _moved(self, before: tuple[float, float] | None, low: float, high: float) -> bool:
        if before is None:
            return True
        return max(before[0] - low, high - before[1]) > self.stillness.share * (
            max(high, 0) - min(low, 0)
        )


def tokens_of(batch: Mapping[str, Any]) -> int:
    """Positions of a batch that are attended to; without a mask or token ids, its rows."""
    if isinstance(mask := batch.get("attention_mask"), Tensor) and mask.ndim == 2:
        return int((mask != 0).sum())
    if isinstance(ids := batch.get("input_ids"), Tensor):
        return ids.numel()
    first: Sequence[Tensor] = [
        value for value in batch.values() if isinstance(value, Tensor) and value.ndim
    ]
    return len(first[0]) if first else 1
