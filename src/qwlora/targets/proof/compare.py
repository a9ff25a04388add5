"""The comparison of a runtime with a simulation, layers and outputs of any model, and with itself
after other adapters were active. Logits are compared in `reference.py`.

    layers      each gets the simulation's own input; differences are in steps of its output grid
    outputs     of a model that is not a language model: signal to noise,

        SQNR = 10 log10(sum x^2 / sum (x - x_hat)^2) in dB, x expected, x_hat from the files

    cache       tokens one by one, also while other adapters run between the steps
    switching   a state has the same bits after other adapters were active

NaN and infinity are never within a limit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwlora.graph.capture import EMBEDS, IDS
from qwlora.graph.quantized_graph import Interface, Kind
from qwlora.grid.encoding import sqnr_db
from qwlora.targets.proof.checks import LIMITS, Check, Limits, Parity, at_least, at_most, is_so
from qwlora.targets.proof.reference import (
    Reference,
    compare_logits,
    first_sequences,
    is_same,
    largest,
)
from qwlora.targets.target import Runtime

DECODED = 16  # tokens
# Values of a layer whose mean is partly chance: of 64 values of a lora_A, 4 were one step off, a
# mean of 0.0625 steps (docs/log/runtimes.md).
FEW = 1000
# dB; a wrong operator gives less, however much rounding changes. Those of the HTP that were found
# gave -14 to 2 dB (docs/log/runtimes.md).
WRONG = 15.0
_OTHERS = 2  # states that run between the steps


def compare_layers(
    runtime: Runtime, reference: Reference, batch: Mapping[str, Any], limits: Limits = LIMITS
) -> Parity:
    """Run every layer on the simulation's value of its inputs for `batch`, and compare in steps of
    each layer's output grid. A mean of fewer than `FEW` values counts as if there were as many, the
    others equal."""
    graph, simulated = reference.graph(), reference.values(batch)
    names = [mark.name for mark in graph.marks if mark.kind is Kind.ACTIVATION]
    worst, most, mean, checks = "", 0.0, 0.0, list[Check]()
    if names:  # else only weights are quantized
        values = {name: simulated[name] for name in names}
        outputs = runtime.run_layers(values, reference.bind(batch))
        steps = [(outputs[n] - values[n]).abs() / graph.encodings[n].scale for n in names]
        worst_steps = torch.stack([s.max() for s in steps])
        worst = names[int(worst_steps.argmax())]
        most = float(worst_steps.max())  # NaN if one of them is, like the mean
        mean = float(torch.stack([s.sum() / max(s.numel(), FEW) for s in steps]).max())
        of_worst = f"difference of layer {worst}, the worst of {len(names):,}"
        of_mean = "largest mean difference of a layer"
        checks = [
            at_most(of_worst, most, limits.layer_steps, "steps"),
            at_most(of_mean, mean, limits.layer_mean_steps, "steps"),
        ]
    figures = {"worst_layer": worst, "worst_layer_steps": most, "worst_layer_mean_steps": mean}
    return Parity({**figures, "layers": len(names)}, tuple(checks))


def output_check(name: str, sqnr: float, floor: float, limits: Limits, where: str = "") -> Check:
    """Whether an output is as near as two simulations of it are; both in dB."""
    least = max(WRONG, min(limits.sqnr, floor - limits.below_floor))
    return at_least(f"signal to noise of output {name}{where}", sqnr, least, "dB")


def compare_outputs(
    reference: Reference,
    batches: Collection[Mapping[str, Any]],
    runtime: Runtime,
    limits: Limits = LIMITS,
    where: str = "",
) -> Parity:
    """Compare every output on `batches`; `where` is a part of a sentence, such as " on the HTP"."""
    sums, most = dict[str, Tensor](), dict[str, float]()  # of squares; the largest difference
    for batch in batches:
        outputs = runtime.run(reference.bind(batch))
        perturbed = reference.perturbed_outputs(batch)
        for name, expected in reference.outputs(batch).items():
            signal, difference = expected.double(), outputs[name].double() - expected.double()
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


def is_language_model(interface: Interface) -> bool:
    """Whether a graph takes token ids or their embeddings, and returns logits of each token."""
    # Logits [batch, classes] are those of a classifier.
    is_logits = interface.primary == "logits" and len(interface.shapes["logits"]) == 3
    return not {IDS, EMBEDS}.isdisjoint(interface.inputs) and is_logits


def compare_cache(
    runtime: Runtime,
    reference: Mapping[str, Tensor],
    adapter: Path | None,
    others: Sequence[Path],
    limits: Limits = LIMITS,
) -> Parity:
    """Run the first sequence as a prefill and then token by token: compare the logits of these
    tokens, and their bits while others (None: the base) run between the steps."""
    ids = reference["ids"][:1]
    count = min(DECODED, ids.shape[1] - 1)
    logits = _stepwise(runtime, adapter, [], ids, count)
    states = [state for state in (None, *others) if state != adapter]
    # Each state between the steps takes as long as the first run.
    switched = _stepwise(runtime, adapter, states[:_OTHERS], ids, count)
    runtime.use(None)
    first, where = first_sequences(reference, 1), f" of {count} tokens, one by one with the cache"
    run = compare_logits(lambda _: logits, first, limits, where=where, last=count)
    what = "with the cache, logits have the same bits if other adapters run between the steps"
    return run.extended({}, is_so(what, is_same(logits, switched)))


def _stepwise(
    runtime: Runtime, adapter: Path | None, between: Sequence[Path | None], ids: Tensor, count: int
) -> Tensor:
    """Logits of the last `count` tokens, run one by one, each also by the states `between`."""
    states = (adapter, *between)
    caches: list[dict[str, Tensor]] = [{} for _ in states]
    steps = []
    for part in (ids[:, :-count], *ids[:, -count:].split(1, dim=1)):
        for number, state in enumerate(states):
            runtime.use(state)
            logits, caches[number] = runtime.extend(part, caches[number])
            if number == 0:
                steps.append(logits)
    return torch.cat(steps[1:], dim=1)


def switching(
    runtime: Runtime, adapter: Path | None, others: Sequence[Path], ids: Tensor
) -> Iterator[Check]:
    """Whether each state (None: the base) gives the same bits after other adapters were active."""
    before: dict[Path | None, Tensor] = {}
    for state in (None, adapter, *others, None, adapter):
        runtime.use(state)
        logits = runtime.logits(ids)
        if state in before:
            name = "without an adapter" if state is None else f"with adapter {state.name}"
            what = f"logits {name} have the same bits after other adapters were active"
            yield is_so(what, is_same(before[state], logits))
        before[state] = logits
    runtime.use(None)
