"""The comparison of a runtime with a simulation: layers, and outputs of any model. Logits
are compared in `reference.py`.

    layers      each gets the simulation's own input; differences are in steps of its output grid
    outputs     of a model that is not a language model: signal to noise,

        SQNR = 10 log10(sum x^2 / sum (x - x_hat)^2) in dB, x expected, x_hat from the files

NaN and infinity are never within a limit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from qwlora.data.sequences import Sequences, as_sequences
from qwlora.errors import VerificationError
from qwlora.graph.call_arguments import as_arguments
from qwlora.graph.capture import EMBEDS, IDS
from qwlora.graph.quantized_graph import Interface, Kind
from qwlora.grid.encoding import sqnr_db
from qwlora.targets.proof.checks import LIMITS, Check, Limits, Parity, at_least, at_most
from qwlora.targets.proof.reference import (
    Reference,
    compare_first,
    compare_logits,
    largest,
    make_reference,
    simulated_logits,
)
from qwlora.targets.target import Runtime

FEW = 1000  # values of a layer, whose mean is partly chance
WRONG = 15.0  # dB; a wrong operator gives less, however much rounding changes


def compare_layers(
    runtime: Runtime, reference: Reference, batch: Mapping[str, Any], limits: Limits = LIMITS
) -> Parity:
    """Run every layer on the simulation's value of its inputs for `batch`, and compare in steps of
    each layer's output grid. A mean of fewer than `FEW` values counts as if there were as many, the
    others equal: of 64 values, a few are a step off by chance."""
    graph, simulated = reference.graph(), reference.values(batch)
    names = [mark.name for mark in graph.marks if mark.kind is Kind.ACTIVATION]
    figures: dict[str, Any] = {
        "worst_layer": "",
        "worst_layer_steps": 0.0,
        "worst_layer_mean_steps": 0.0,
        "layers": len(names),
    }
    if not names:  # only weights are quantized
        return Parity(figures, ())
    values = {name: simulated[name] for name in names}
    outputs = runtime.run_layers(values, reference.bind(batch))
    steps = [(outputs[name] - values[name]).abs() / graph.encodings[name].scale for name in names]
    worst_steps = torch.stack([s.max() for s in steps])
    means = torch.stack([s.sum() / max(s.numel(), FEW) for s in steps])
    worst = int(worst_steps.argmax())
    largest_steps, mean = float(worst_steps[worst]), float(means.max())  # NaN if one of them is
    figures["worst_layer"], figures["worst_layer_steps"] = names[worst], largest_steps
    figures["worst_layer_mean_steps"] = mean
    what = f"difference of layer {names[worst]}, the worst of {len(names):,}"
    of_mean = "largest mean difference of a layer"
    return Parity(
        figures,
        (
            at_most(what, largest_steps, limits.layer_steps, "steps"),
            at_most(of_mean, mean, limits.layer_mean_steps, "steps"),
        ),
    )


def output_check(name: str, sqnr: float, floor: float, limits: Limits, where: str = "") -> Check:
    """Whether an output is as near as two simulations of it are; both in dB."""
    least = max(WRONG, min(limits.sqnr, floor - limits.below_floor))
    return at_least(f"signal to noise of output {name}{where}", sqnr, least, "dB")


def verify_outputs(
    runtime: Runtime, reference: Reference, batches: Collection[Any], limits: Limits = LIMITS
) -> Parity:
    """Compare every output on `batches`, and every layer on the first of them.

    Args:
        batches: dicts of arguments, tensors or tuples of tensors (`call_arguments.py`).

    Raises:
        VerificationError: `batches` is empty.
        ExportError: the runtime refuses the files.
    """
    if not batches:
        raise VerificationError("verification needs at least one batch of the model's inputs")
    inputs = reference.graph().interface.inputs
    batches = [as_arguments(batch, inputs) for batch in batches]

    def compare(opened: Runtime, limits: Limits, where: str) -> Parity:
        return compare_outputs(opened, reference, batches, limits, where)

    if (parity := runtime.parity(compare, limits)) is not None:
        return parity
    layers = Parity({}, ())
    if runtime.has_layers:
        layers = compare_layers(runtime, reference, batches[0], limits)
    outputs = compare(runtime, limits, "")
    return Parity({**layers.figures, **outputs.figures}, (*outputs.checks, *layers.checks))


def compare_outputs(
    runtime: Runtime,
    reference: Reference,
    batches: Collection[Mapping[str, Any]],
    limits: Limits = LIMITS,
    where: str = "",
) -> Parity:
    """Compare every output on `batches`.

    Args:
        where: in a sentence, such as " on the HTP".
    """
    sums, most = dict[str, Tensor](), dict[str, float]()  # of squares; the largest difference
    for batch in batches:
        found = runtime.run(reference.bind(batch))
        perturbed = reference.perturbed_outputs(batch)
        for name, expected in reference.outputs(batch).items():
            signal, difference = expected.double(), found[name].double() - expected.double()
            parts = signal, difference, perturbed[name].double() - signal
            squares = torch.stack([part.square().sum() for part in parts])
            sums[name] = sums[name] + squares if name in sums else squares
            most[name] = max(most.get(name, 0.0), largest(difference.abs()))
    sqnr = {name: sqnr_db(float(s[0]), float(s[1])) for name, s in sums.items()}
    floor = {name: sqnr_db(float(s[0]), float(s[2])) for name, s in sums.items()}
    figures = {
        "primary": reference.graph().interface.primary,
        "sqnr": sqnr,
        "floor_sqnr": floor,
        "max_abs_difference": most,
    }
    checks = (output_check(name, sqnr[name], floor[name], limits, where) for name in sums)
    return Parity(figures, tuple(checks))


def verify_language_model(
    runtime: Runtime,
    simulation: Reference,
    sequences: Sequences | Int64[Tensor, "count tokens"],
    layer_tokens: int,
    limits: Limits = LIMITS,
    least_noise: float = 0.0,
) -> Parity:
    """Compare logits and perplexity on `sequences`, and layers on a part of the first one if the
    runtime gives these.

    Args:
        layer_tokens: tokens for the comparison layer by layer.
        least_noise: see `make_reference`.

    Raises:
        ExportError: the runtime refuses the files.
    """
    data, layers = as_sequences(sequences), Parity({}, ())
    if runtime.has_layers:
        ids = data.input_ids[:1, :layer_tokens]
        layers = compare_layers(runtime, simulation, {"input_ids": ids}, limits)
    logits, perturbed = simulated_logits(simulation)
    reference = make_reference({"adapter": logits}, data, {"adapter": perturbed}, None, least_noise)
    run = runtime.parity(partial(compare_first, reference), limits)
    run = run or compare_logits(runtime.logits, reference, limits)
    return run.extended(layers.figures, *layers.checks)


def is_language_model(interface: Interface) -> bool:
    """Whether a graph takes token ids or their embeddings, and returns next-token logits [batch,
    tokens, vocabulary]."""
    is_logits = interface.primary == "logits" and len(interface.shapes["logits"]) == 3
    return not {IDS, EMBEDS}.isdisjoint(interface.inputs) and is_logits
