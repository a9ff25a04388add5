"""The comparison of a runtime with a reference: logits, layers, outputs of any model.

    logits      log-probabilities of the likeliest tokens, likeliest token, perplexity
    layers      each gets the simulation's own input, so errors cannot accumulate; differences are
                in steps of its output grid
    outputs     of a model that is no language model: signal to noise,

        SQNR = 10 log10(sum x^2 / sum (x - x_hat)^2) in dB, x expected, x_hat from the files

Where only float32 rounding may differ, a log-probability may differ by 2 LOGIT_DIFFERENCE of the
largest logit (it is a logit minus a mean of logits), and the likeliest token of one token in a
thousand. Where the reference has an `other` computation (`reference.py`), that is a noise floor: no
file can agree with a simulation better than two equally correct simulations agree with each other.

    rounding    a log-probability may also differ by twice the largest difference of a logit
    noise       a single one by any amount, but the root mean square only by NOISE times the floor's
    perplexity  may differ by what the recipe allows, and by the floor on top. With d_t the
                difference of two simulations in the log-likelihood of token t of n, the mean of
                the d_t is within 1.96 sqrt(sum_t d_t^2) / n of zero in 95 % of samples

The Kullback-Leibler divergence counts all tokens that are not among the likeliest as one:

    KL = sum_i p_i log(p_i / q_i) + r log(r / s),    r = 1 - sum_i p_i,  s = 1 - sum_i q_i

NaN and infinity are never within a limit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from qwlora.data.sequences import IGNORED, Sequences, as_sequences
from qwlora.errors import VerificationError
from qwlora.graph.call_arguments import as_arguments
from qwlora.graph.capture import EMBEDS, IDS
from qwlora.graph.quantized_graph import Interface, Kind
from qwlora.grid.encoding import sqnr_db
from qwlora.system.progress import Track, untracked
from qwlora.targets.proof.checks import LIMITS, Check, Limits, Parity, at_least, at_most
from qwlora.targets.proof.reference import (
    Logits,
    Reference,
    check_ids,
    first_sequences,
    make_reference,
    simulated_logits,
    token_losses,
)
from qwlora.targets.target import Runtime

LOGIT_DIFFERENCE = 1e-4
AGREEMENT = 0.999
# Of the noise floor, which is itself the difference of one sample. With 4 layers on grids of 16
# bits, ONNX Runtime has 1 time the floor's, and 60 times if it rounds activations to 8 bits.
NOISE = 4.0
FEW = 1000  # values of a layer, whose mean is partly chance
SLOW_STEPS = 4  # tokens that a program gets one by one if it takes seconds for each
WRONG = 15.0  # dB; a wrong operator gives less, however much rounding changes


def logits_checks(figures: Mapping[str, Any], limits: Limits, where: str = "") -> list[Check]:
    """The checks of `compare_logits`.

    Args:
        where: in a sentence, such as " on the HTP".
    """
    rows = []
    if not math.isfinite(figures["max_log_prob_difference"]):
        rows.append(at_most(f"largest logit{where}", math.nan, math.inf))
    if "perplexity" in figures:
        both = figures["perplexity"], figures["reference_perplexity"]
        drift = abs(both[0] / both[1] - 1) if all(map(math.isfinite, both)) else math.nan
        allowed = limits.perplexity_difference + figures["floor_perplexity_difference"]
        rows.append(at_most(f"difference of perplexity{where}", drift, allowed, "share"))
    what = f"tokens with the same likeliest token{where}"
    same, least = figures["top1_agreement"], figures["floor_top1_agreement"]
    rows.append(at_least(what, same, least, "share"))
    if "noise_allowed" in figures:
        what = f"difference of log-probabilities{where} (root mean square)"
        differs, allowed = figures["rms_log_prob_difference"], figures["noise_allowed"]
    else:
        what = f"largest difference of a log-probability{where}"
        differs, allowed = figures["max_log_prob_difference"], figures["largest_allowed"]
    return [*rows, at_most(what, differs, allowed, "nats")]


def compare_logits(
    logits: Logits,
    reference: Mapping[str, Tensor],
    limits: Limits = LIMITS,
    state: str = "adapter",
    where: str = "",
    last: int | None = None,
    track: Track = untracked,
) -> Parity:
    """Compare a runtime's logits of the reference's sequences.

    If only some tokens count for the loss, the logits that predict those are compared.

    Args:
        logits: of token ids [1, tokens].
        last: compare the last tokens of each sequence only, whose logits `logits` returns.

    Returns:
        figures: the largest difference of a log-probability, which is infinite if logits of any
        token hold NaN or infinity, and others; perplexities unless `last`; and what rounding
        explains: a share and a relative difference of perplexity in 95 % of samples as large,
        differences of log-probabilities.

    Raises:
        SourceError: the reference is of another vocabulary.
    """
    rows = list(zip(reference["ids"], reference["labels"], strict=True))
    rows = rows[: len(reference[f"{state}.top"])]
    part = slice(0 if last is None else -last, None)
    most, same, divergence, nll, expected_nll = 0.0, 0, 0.0, 0.0, 0.0
    differences = list[Tensor]()
    masks = [_predicting(labels)[part] for _, labels in rows]
    if last is not None or not any(bool(mask.any()) for mask in masks):
        masks = [torch.ones_like(mask) for mask in masks]
    for number, (ids, labels) in enumerate(track(rows, "verifying", len(rows))):
        predicting = masks[number]
        found = logits(ids[None]).double()
        top = reference[f"{state}.top"][number, part].long()
        check_ids(top, found.shape[-1])
        log_probs = found[0].log_softmax(-1)
        expected = reference[f"{state}.log_probs"][number, part].double()
        at = log_probs.gather(-1, top)
        most = max(most, largest((at - expected)[predicting].abs()))
        if not bool(found.isfinite().all()):  # also at tokens that are not compared
            most = math.inf
        differences.append((at - expected)[predicting])
        same += int((log_probs.argmax(-1) == top[:, 0])[predicting].sum())
        divergence += float(_divergence(expected, at)[predicting].sum())
        if last is None:
            nll += float(token_losses(found, labels).sum())
            expected_nll += float(reference[f"{state}.losses"][number].sum())
    tokens = int(torch.cat(masks).sum())
    counted = sum(int((labels[1:] != IGNORED).sum()) for _, labels in rows)
    figures: dict[str, Any] = {
        "max_log_prob_difference": most,
        "rms_log_prob_difference": _rms(torch.cat(differences)),
        "top1_agreement": same / tokens,
        "kl_divergence": divergence / tokens,
    }
    if last is None:
        figures["perplexity"] = perplexity(nll, counted)
        figures["reference_perplexity"] = perplexity(expected_nll, counted)
    figures |= {"tokens": tokens, "sequences": len(rows)}
    figures |= _floor(reference, state, masks, part, counted)
    return Parity(figures, tuple(logits_checks(figures, limits, where)))


def _predicting(labels: Tensor) -> Tensor:
    """The tokens whose logits predict one that counts in the loss. Nothing follows the last; its
    logits are compared if it counts itself."""
    mask = (labels != IGNORED).roll(-1)
    mask[-1] = labels[-1] != IGNORED
    return mask


def _floor(
    reference: Mapping[str, Tensor],
    state: str,
    compared: list[Tensor],
    part: slice,
    counted: int,
) -> dict[str, float]:
    """What rounding alone explains."""
    agreement, drift = AGREEMENT, 0.0
    if (same := reference.get(f"{state}.other_same")) is not None:
        shares = [row[part][mask] for row, mask in zip(same, compared, strict=True)]
        agreement = lowest_agreement(torch.cat(shares))
        change = reference[f"{state}.other_losses"] - reference[f"{state}.losses"]
        drift = perplexity_floor(float(change.square().sum()), counted)
    floor = {"floor_top1_agreement": agreement, "floor_perplexity_difference": drift}
    exact = 2 * LOGIT_DIFFERENCE * float(reference[f"{state}.largest"].max())
    if (noise := reference.get(f"{state}.noise")) is not None:
        return {**floor, "noise_allowed": exact + NOISE * _rms(noise.double())}
    rounding = reference.get(f"{state}.rounding")
    coarse = 0.0 if rounding is None else 2 * float(rounding.max())
    return {**floor, "largest_allowed": exact + coarse}


def lowest_agreement(same: Tensor) -> float:
    """Lower end of the 95 % interval (Wilson) for the share in another sample of the same size.

    Both are samples, so their difference has the variance of a sample half as large.
    """
    n, share, z = len(same) / 2, float(same.double().mean()), 1.96
    center = share + z * z / (2 * n)
    margin = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (center - margin) / (1 + z * z / n)


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


def perplexity(nll: float, tokens: int) -> float:
    """`exp(nll / tokens)`; infinite if that overflows, NaN if `nll` is or there are no tokens.

    Args:
        nll: sum of the losses of `tokens` tokens, nats.
    """
    try:
        return math.exp(nll / tokens) if tokens else math.nan
    except OverflowError:
        return math.inf


def largest(differences: Tensor) -> float:
    """The largest of absolute differences; infinite if one is NaN or infinite, 0 if there is
    none."""
    if not differences.numel():
        return 0.0
    value = float(differences.max())  # torch's max, unlike Python's, is NaN if any value is
    return math.inf if math.isnan(value) else value


def compare_first(
    reference: Mapping[str, Tensor], runtime: Runtime, limits: Limits, where: str
) -> Parity:
    """`compare_logits` of the first sequence, its last tokens one by one: for slow programs."""
    one = first_sequences(reference, 1)
    steps = min(SLOW_STEPS, one["ids"].shape[1] - 1)
    return compare_logits(partial(runtime.logits, steps=steps), one, limits, where=where)


def is_same(logits: Tensor, other: Tensor) -> bool:
    """Whether two results are equal, also in where they hold NaN."""
    return logits.allclose(other, rtol=0, atol=0, equal_nan=True)


def _rms(differences: Tensor) -> float:
    return float(differences.square().mean().sqrt())


def _divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL of each row, in nats; see the module."""
    p, rest = expected.exp(), (1 - expected.exp().sum(-1)).clamp_min(0)
    other = (1 - found.exp().sum(-1)).clamp_min(torch.finfo(torch.float64).tiny)
    tail = torch.where(rest > 0, rest * (rest.clamp_min(1e-300).log() - other.log()), 0.0)
    return (p * (expected - found)).sum(-1) + tail


def is_told_apart(reference: Mapping[str, Tensor], limits: Limits) -> bool:
    """Whether a runtime that computes the base instead of the adapter would break a limit.

    True if the reference has no base. Of log-probabilities, those of the text's own tokens count.
    """
    if "base.losses" not in reference:
        return True
    few = {name: t[: len(reference["base.top"])] for name, t in reference.items()}
    base, adapter = few["base.losses"], few["adapter.losses"]
    counted = int((few["labels"][:, 1:] != IGNORED).sum())
    compared = [torch.ones_like(row, dtype=torch.bool) for row in few["ids"]]
    same = few["base.top"][..., 0] == few["adapter.top"][..., 0]
    figures = {
        "max_log_prob_difference": largest((base - adapter).abs()),
        "rms_log_prob_difference": _rms(base - adapter),
        "top1_agreement": float(same.double().mean()),
        "perplexity": perplexity(float(base.sum()), counted),
        "reference_perplexity": perplexity(float(adapter.sum()), counted),
        **_floor(few, "adapter", compared, slice(None), counted),
    }
    return not all(check.passed for check in logits_checks(figures, limits))


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
