"""The proof of exported files: run them in their runtime and compare with the simulation.

    end to end      every output (SQNR); for a causal language model logits, top-1 token, perplexity
    noise floor     the same comparison between two simulations that differ only in float32 rounding
                    (`Simulation.perturbed_outputs`)
    layer by layer  each layer gets the simulation's own input, so errors cannot accumulate;
                    differences are in steps of the layer's output grid

The noise floor is needed because rounding amplifies: in a deep model on a grid, the last bit of one
layer becomes a whole step of a later one. No file can agree with a simulation better than two
equally correct simulations agree with each other. For perplexity, with d_t the difference of two
such simulations in the log-likelihood of token t of n, the mean of the d_t is within

    1.96 sqrt(sum_t d_t^2) / n    of zero in 95 % of samples

A file may differ by what the recipe allows, and by this noise on top (`largest_drift`).

    SQNR = 10 log10(sum x^2 / sum (x - x_hat)^2) in dB, x simulated, x_hat from the files

NaN and infinity are never within a limit (`finite_figures.py`).

Nothing here knows a file format: a `Runtime` runs the files (see `target.py`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from qwlora.data.sequences import IGNORED, Sequences, as_sequences
from qwlora.errors import VerificationError
from qwlora.export.finite_figures import largest, only_finite, perplexity
from qwlora.graph.call_arguments import as_arguments
from qwlora.graph.quantized_graph import Interface, Kind, QuantizedGraph
from qwlora.grid.sqnr import sqnr_db
from qwlora.progress import Track, one_step, untracked

FEW = 1000  # values of a layer, whose mean is partly chance
WRONG = 15.0  # dB; a wrong operator gives less, however much rounding changes


@runtime_checkable
class Runtime(Protocol):
    """An exported model, opened in the program that its files were written for."""

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every output by name, given every input by name."""

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] of token ids [batch, tokens], none of them masked."""

    def run_layers(
        self, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every quantized activation in `values`, computed from the others in `values`.

        Args:
            values: the simulated value of each quantized activation.
            tensors: every input of the model by name.
        """

    def layers(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every quantized activation of one run, by name of its tensor in the files."""


@runtime_checkable
class Reference(Protocol):
    """What files are compared with; `qwlora.Simulation` is one."""

    def outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def perturbed_outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def values(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def bind(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def graph(self) -> QuantizedGraph: ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Largest allowed differences.

    Args:
        layer_steps, layer_mean_steps: of any layer, largest and mean, in steps of its output grid.
            A mean of fewer than `FEW` values counts as if there were as many, the others equal: of
            64 values, a few are a step off by chance.
        perplexity_difference: of a language model, relative.
        sqnr, below_floor: an output may be `below_floor` dB below its noise floor; `sqnr` dB is
            always enough, and less than `WRONG` dB never is.
    """

    layer_steps: float = 2.0
    layer_mean_steps: float = 0.05
    perplexity_difference: float = 0.003
    sqnr: float = 60.0
    below_floor: float = 6.0


@dataclass(frozen=True)
class LayerParity:
    """How far layers are from the simulation, in steps of each layer's output grid.

    Args:
        worst_layer: the layer with the largest difference, `worst_layer_steps`.
        worst_layer_mean_steps: the largest mean difference of any layer.
        layers: how many were compared.
    """

    worst_layer: str
    worst_layer_steps: float
    worst_layer_mean_steps: float
    layers: int

    def to_json(self) -> dict[str, Any]:
        """The fields, without numbers that are NaN or infinite."""
        return only_finite(asdict(self))

    def broken_limits(self, limits: Limits) -> Iterator[str]:
        """A sentence for each limit that is exceeded."""
        if not math.isfinite(self.worst_layer_steps):
            yield f"layer {self.worst_layer} computes NaN or infinity"
            return
        if not self.worst_layer_steps <= limits.layer_steps:
            yield (
                f"layer {self.worst_layer} is {self.worst_layer_steps:.2f} steps off "
                f"(limit {limits.layer_steps:g})"
            )
        if not self.worst_layer_mean_steps <= limits.layer_mean_steps:
            yield (
                f"one layer is {self.worst_layer_mean_steps:.4f} steps off on average "
                f"(limit {limits.layer_mean_steps:g})"
            )


@dataclass(frozen=True)
class OutputParity(LayerParity):
    """How far the outputs of any model are from the simulation's.

    Args:
        primary: the model's main output.
        sqnr: dB, by output; infinite if equal, NaN if one holds NaN or infinity.
        floor_sqnr: noise floor, dB, by output.
        max_abs_difference: by output.
    """

    primary: str
    sqnr: dict[str, float]
    floor_sqnr: dict[str, float]
    max_abs_difference: dict[str, float]

    def broken_limits(self, limits: Limits) -> Iterator[str]:
        for output, sqnr in self.sqnr.items():
            floor = self.floor_sqnr[output]
            least = max(WRONG, min(limits.sqnr, floor - limits.below_floor))
            if math.isnan(sqnr):
                yield f"output {output} holds NaN or infinity"
            elif not sqnr >= least:
                yield (
                    f"output {output} is {sqnr:.1f} dB from the simulation's "
                    f"(limit {least:.1f} dB, floor {floor:.1f} dB)"
                )
        yield from super().broken_limits(limits)


@dataclass(frozen=True)
class LanguageModelParity(LayerParity):
    """How far a causal language model is from the simulation. Differences of logits are absolute.

    Args:
        max_abs_logit_difference: infinite if logits of any token hold NaN or infinity.
        perturbed_top1_agreement, perturbed_max_abs_logit_difference: noise floor, as measured.
        floor_top1_agreement: lower end of the 95 % interval around `perturbed_top1_agreement`; the
            limit of `top1_agreement`.
        floor_perplexity_difference: relative difference of perplexity that rounding alone explains
            in 95 % of samples of this size; see `largest_drift`.
    """

    max_abs_logit_difference: float
    mean_abs_logit_difference: float
    top1_agreement: float
    perturbed_top1_agreement: float
    floor_top1_agreement: float
    perturbed_max_abs_logit_difference: float
    perplexity: float
    simulated_perplexity: float
    floor_perplexity_difference: float
    sequences: int
    tokens: int

    def broken_limits(self, limits: Limits) -> Iterator[str]:
        if not math.isfinite(self.max_abs_logit_difference):
            yield "logits hold NaN or infinity"
        yield from broken_perplexity(
            self.perplexity, self.simulated_perplexity, self.floor_perplexity_difference, limits
        )
        if not self.top1_agreement >= self.floor_top1_agreement:
            yield (
                f"the most likely token agrees in {self.top1_agreement:.2%} of cases, below the "
                f"noise floor of {self.floor_top1_agreement:.2%}"
            )
        yield from super().broken_limits(limits)


def largest_drift(limit: float, floor: float) -> float:
    """The largest allowed relative difference of a perplexity from the expected one.

    Args:
        limit: of what the files may compute differently.
        floor: what rounding explains in 95 % of samples of this size; see `perplexity_floor`.
    """
    return limit + floor


def broken_perplexity(
    found: float, expected: float, floor: float, limits: Limits, where: str = ""
) -> Iterator[str]:
    """A sentence, if a perplexity differs by more than `largest_drift`.

    Args:
        where: it was computed, such as " on the HTP".
    """
    if not all(map(math.isfinite, (found, expected, floor))):
        yield (
            f"perplexity{where} is {found:.4f}, and the simulation's is {expected:.4f} (limit "
            f"{limits.perplexity_difference:.2%} and the noise floor of {floor:.2%})"
        )
        return
    drift = abs(found / expected - 1)
    if not drift <= largest_drift(limits.perplexity_difference, floor):
        yield (
            f"perplexity{where} {found:.4f} is {drift:.2%} from the simulation's {expected:.4f} "
            f"(limit {limits.perplexity_difference:.2%} and the noise floor of {floor:.2%})"
        )


def check_parity(parity: LayerParity, limits: Limits, name: str) -> None:
    """Compare a result with its limits.

    Args:
        name: of the exported files, for the message.

    Raises:
        VerificationError: a limit is exceeded; the message lists every one.
    """
    if broken := list(parity.broken_limits(limits)):
        raise VerificationError(
            f"{name}: the exported files do not compute what was simulated", broken
        )


def verify_outputs(
    runtime: Runtime,
    reference: Reference,
    batches: Collection[Any],
    track: Track = untracked,
) -> OutputParity:
    """Compare every output on `batches`, and every layer on the first of them.

    Args:
        batches: dicts of arguments, tensors or tuples of tensors (`call_arguments.py`).

    Raises:
        VerificationError: `batches` is empty.
        ExportError: the runtime refuses the files.
    """
    if not batches:
        raise VerificationError("verification needs at least one batch of the model's inputs")
    interface = reference.graph().interface
    batches = [as_arguments(batch, interface.inputs) for batch in batches]
    layers = compare_layers(runtime, reference, batches[0])
    exported: dict[str, OutputDifference] = {}
    floor: dict[str, OutputDifference] = {}
    for batch in track(batches, "verifying", len(batches)):
        found = runtime.run(reference.bind(batch))
        perturbed = reference.perturbed_outputs(batch)
        for name, expected in reference.outputs(batch).items():
            exported.setdefault(name, OutputDifference()).update(found[name], expected)
            floor.setdefault(name, OutputDifference()).update(perturbed[name], expected)
    return OutputParity(
        **vars(layers),
        primary=interface.primary,
        sqnr={name: difference.sqnr for name, difference in exported.items()},
        floor_sqnr={name: difference.sqnr for name, difference in floor.items()},
        max_abs_difference={name: difference.largest for name, difference in exported.items()},
    )


def verify_language_model(
    runtime: Runtime,
    reference: Reference,
    sequences: Sequences | Int64[Tensor, "count tokens"],
    layer_tokens: int,
    track: Track = untracked,
) -> LanguageModelParity:
    """Compare logits and perplexity on `sequences`, and layers on a part of the first one.

    If only some tokens count for the loss (see `Sequences`), the logits that predict those are
    compared.

    Args:
        layer_tokens: tokens for the comparison layer by layer.

    Raises:
        VerificationError: the graph is not that of a causal language model.
        ExportError: the runtime refuses the files.
    """
    interface = reference.graph().interface
    _refuse_other_tasks(interface)
    data, primary = as_sequences(sequences), interface.primary
    first = data.input_ids[:1, :layer_tokens]
    with one_step(track, "comparing layers"):
        layers = compare_layers(runtime, reference, {"input_ids": first})
    exported, floor = LogitDifference(), NoiseFloor()
    nll, simulated_nll = 0.0, 0.0
    for ids, labels in track(data.rows(), "verifying", len(data)):
        batch = {"input_ids": ids[None]}
        expected = reference.outputs(batch)[primary]
        found = runtime.run(reference.bind(batch))[primary]
        perturbed = reference.perturbed_outputs(batch)[primary]
        predicting = (labels != IGNORED).roll(-1)
        # Nothing follows the last token; its logits are compared if it counts itself.
        predicting[-1] = labels[-1] != IGNORED
        exported.update(found[:, predicting], expected[:, predicting])
        if not bool(found.isfinite().all()):  # also at tokens that are not compared
            exported.largest = math.inf
        floor.update(perturbed[:, predicting], expected[:, predicting])
        simulated = token_losses(expected, labels)
        nll += float(token_losses(found, labels).sum())
        simulated_nll += float(simulated.sum())
        floor.update_losses(token_losses(perturbed, labels), simulated)
    return LanguageModelParity(
        **vars(layers),
        max_abs_logit_difference=exported.largest,
        mean_abs_logit_difference=exported.total / exported.count,
        top1_agreement=exported.agreement,
        perturbed_top1_agreement=floor.agreement,
        floor_top1_agreement=floor.lowest_agreement,
        perturbed_max_abs_logit_difference=floor.largest,
        perplexity=perplexity(nll, data.loss_tokens),
        simulated_perplexity=perplexity(simulated_nll, data.loss_tokens),
        floor_perplexity_difference=perplexity_floor(floor.squared_noise, data.loss_tokens),
        sequences=len(data),
        tokens=exported.tokens,
    )


def _refuse_other_tasks(interface: Interface) -> None:
    """Refuse graphs without token ids, or without logits [batch, tokens, vocabulary]."""
    shape = interface.shapes[interface.primary]
    if "input_ids" not in interface.inputs or interface.primary != "logits" or len(shape) != 3:
        raise VerificationError(
            "verify_onnx compares the next-token logits [batch, tokens, vocabulary] of a causal "
            f"language model. This graph takes {', '.join(interface.inputs)} and returns "
            f"{interface.primary} [{', '.join(map(str, shape))}]. "
            "Use qwlora.verify_onnx_outputs(folder, simulation, batches)"
        )


def compare_layers(runtime: Runtime, reference: Reference, batch: Mapping[str, Any]) -> LayerParity:
    """Run every layer on the simulation's value of its inputs for `batch`."""
    graph, simulated = reference.graph(), reference.values(batch)
    names = [mark.name for mark in graph.marks if mark.kind is Kind.ACTIVATION]
    if not names:  # only weights are quantized
        return LayerParity("", 0.0, 0.0, 0)
    values = {name: simulated[name] for name in names}
    outputs = runtime.run_layers(values, reference.bind(batch))
    steps = [(outputs[name] - values[name]).abs() / graph.encodings[name].scale for name in names]
    largest = torch.stack([s.max() for s in steps])
    means = [s.sum() / max(s.numel(), FEW) for s in steps]
    mean = torch.stack(means).max()  # NaN if one of them is
    worst = int(largest.argmax())
    return LayerParity(names[worst], float(largest[worst]), float(mean), len(names))


@dataclass
class OutputDifference:
    """Running difference between one output of two computations; `largest` is infinite and `sqnr`
    NaN if one of them holds NaN or infinity."""

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0

    def update(self, found: Tensor, expected: Tensor) -> None:
        """Add one batch."""
        difference = (found.double() - expected.double()).abs()
        self.signal += float(expected.double().square().sum())
        self.noise += float(difference.square().sum())
        self.largest = max(self.largest, largest(difference))

    @property
    def sqnr(self) -> float:
        """In dB."""
        return sqnr_db(self.signal, self.noise)


@dataclass
class LogitDifference:
    """Running difference between logits [batch, tokens, vocabulary] of two computations; `largest`
    is infinite if one of them holds NaN or infinity."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0
    agreeing: int = 0
    tokens: int = 0

    def update(self, found: Tensor, expected: Tensor) -> None:
        difference = (found - expected).abs()
        self.largest = max(self.largest, largest(difference))
        self.total += float(difference.double().sum())
        self.count += difference.numel()
        self.agreeing += int((found.argmax(-1) == expected.argmax(-1)).sum())
        self.tokens += found.shape[0] * found.shape[1]

    @property
    def agreement(self) -> float:
        return self.agreeing / self.tokens

    @property
    def lowest_agreement(self) -> float:
        """Lower end of the 95 % interval (Wilson) for another sample of the same size.

        Both are samples, so their difference has the variance of a sample half as large.
        """
        n, share, z = self.tokens / 2, self.agreement, 1.96
        center = share + z * z / (2 * n)
        margin = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return (center - margin) / (1 + z * z / n)


@dataclass
class NoiseFloor(LogitDifference):
    """The same for two equally valid computations, with what it does to losses.

    Args:
        squared_noise: sum over tokens of d_t^2; see the module.
    """

    squared_noise: float = 0.0

    def update_losses(self, found: Tensor, expected: Tensor) -> None:
        """Count `token_losses` of both."""
        self.squared_noise += float((found - expected).square().sum())


def perplexity_floor(squared_noise: float, tokens: int) -> float:
    """Relative difference of perplexity that rounding explains in 95 % of samples; infinite if
    that is too large for a number.

    Args:
        squared_noise: sum over tokens of d_t^2; see the module.
    """
    try:
        return math.expm1(1.96 * math.sqrt(squared_noise) / tokens)
    except OverflowError:
        return math.inf


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each token given those before it; 0 for those not in the loss."""
    return torch.nn.functional.cross_entropy(
        logits[0, :-1].double(), labels[1:], ignore_index=IGNORED, reduction="none"
    )
