"""What exported files are compared with: tokens, what the model says about them, and the comparison
with what the files say.

The model is the trained one, or its simulation where activations are on grids. For each state,
`base` without the adapter and `adapter` with it, n sequences of t tokens:

    ids, labels           int64 [n, t]; labels are IGNORED where a token does not count in the loss
    STATE.top             int32 [n, t, TOP], the likeliest next tokens
    STATE.log_probs       float32 [n, t, TOP], their log-probabilities
    STATE.losses          float64 [n, t - 1], of each token given those before it
    STATE.largest         float32 [n], the largest absolute logit

and, if two correct runtimes of this model differ by more than float32 rounding, what an `other`
computation gives, which is as valid:

    STATE.other_losses    as losses
    STATE.other_same      bool [n, t], whether its likeliest token is the same
    STATE.noise           float32 [n], root mean square of the differences of log-probabilities
    STATE.rounding        float32 [n], instead of `noise`: the largest difference of a logit
    STATE.trained_losses  as losses; if the model is rounded like the files or the runtime, what it
                          says without

`noise` is that of simulations, and `rounding` that of a runtime that rounds activations more
coarsely than float32 (`Backend.rounding`). If all that it computes is on that grid, the model
rounds in the same way, and `noise` is what else may differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from peft import PeftModel
from torch import Tensor

from qwlora.data.sequences import IGNORED, Sequences
from qwlora.errors import SourceError, listed
from qwlora.graph.quantized_graph import QuantizedGraph
from qwlora.simulation.placement_rules import Schemes
from qwlora.system.progress import Track, untracked
from qwlora.targets.proof.checks import LIMITS, Check, Limits, Parity, at_least, at_most
from qwlora.targets.target import Rounding, Runtime

# Share of the largest logit. Only float32 rounding may differ. With SmolLM2's Q4_1 file, llama.cpp
# is off by 8e-6 of it (docs/log/runtimes.md).
LOGIT_DIFFERENCE = 1e-4
AGREEMENT = 0.999  # in one of a thousand tokens, rounding may decide a near tie
# Times the noise floor, which is itself the difference of one sample. With 4 layers on grids of 16
# bits, ONNX Runtime has 1 time the floor's, and 60 times if it rounds activations to 8 bits.
NOISE = 4.0
# Tokens that a slow program gets one by one: the HTP's emulator takes as long for one as for 32.
SLOW_STEPS = 4
TOP = 64
# For the base, which all adapters share, and for a bundle, where the proof is only repeated.
BASE_SEQUENCES = 2
# Tokens of generated text in a bundle. 124 took 51 s with SmolLM2-135M, two cores, four jobs.
PROOF_TOKENS = 64
STATES = ("base", "adapter")
TOLERANCE = 1e-3  # of sums of probabilities, from float32 logits
# Graphs for NPUs round more than a simulation: cosines, masked scores, sigmoids. This share of the
# largest logit counts as noise, about 30 dB; docs/log/runtimes.md measures up to 0.0011.
GRAPHS_NOISE = 0.002
# Of activations of 8 bits, as a share of the largest logit: one of hundreds of a layer's inputs may
# be on another step.
LEAST_FLIP = 2.0**-12
Logits = Callable[[Tensor], Tensor]  # of token ids [1, tokens]


@runtime_checkable
class Reference(Protocol):
    """A simulation to compare files with; `qwlora.Simulation` is one."""

    def outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def perturbed_outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def values(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def bind(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...
    def graph(self) -> QuantizedGraph: ...


@torch.no_grad()
def make_reference(
    logits: Mapping[str, Logits],
    sequences: Sequences,
    perturbed: Mapping[str, Logits] | None = None,
    rounded: Mapping[str, Logits] | None = None,
    least_noise: float = 0.0,
) -> dict[str, Tensor]:
    """The reference that a model gives for a few sequences.

    Args:
        logits: by state, without the adapter and with it, or with it only.
        perturbed: the same with other, equally valid rounding, for models on a grid.
        rounded: the same with a runtime's rounding of activations, for other models.
        least_noise: the least noise that counts, as a share of the largest logit.
    """
    others = perturbed or rounded
    reference = {"ids": sequences.input_ids, "labels": sequences.labels}
    for state in logits:
        part = sequences.first(BASE_SEQUENCES) if state == "base" else sequences
        rows = list[dict[str, Tensor]]()
        for ids, labels in zip(part.input_ids, part.labels, strict=True):
            expected = logits[state](ids[None])
            other = None if others is None else others[state](ids[None])
            row = _row(expected, labels, other)
            if perturbed is not None:
                # The last bit of one layer can become a whole step of a later one, so one logit may
                # differ by any amount. And where no value of these few sequences falls on another
                # step of a coarse grid, one may elsewhere: hence the least noise.
                del row["rounding"]
                row["noise"] = row["noise"].clamp_min(least_noise * row["largest"])
            elif rounded is not None:
                del row["noise"]
            rows.append(row)
        reference |= {f"{state}.{n}": torch.stack([row[n] for row in rows]) for n in rows[0]}
    return reference


def least_noise(schemes: Schemes, cached_graphs: bool) -> float:
    """`least_noise` of `make_reference` for a simulation: a step of its activations, or what the
    graphs of a target with `cached_graphs` round on top."""
    if schemes.policy == "weights-only":
        return 2.0**-16
    bits = min(schemes.activations.bitwidth, schemes.adapter_activation_bitwidth or 16)
    return max(2.0**-bits, GRAPHS_NOISE if cached_graphs else 0.0)


def _row(expected: Tensor, labels: Tensor, other: Tensor | None) -> dict[str, Tensor]:
    # In float64, since differences of float32 rounding are measured.
    log_probs, top = expected[0].double().log_softmax(-1).topk(min(TOP, expected.shape[-1]))
    row = {
        "top": top.int(),
        "log_probs": log_probs.float(),
        "losses": token_losses(expected, labels),
        "largest": expected.abs().max().float(),
    }
    if other is not None:
        differences = other[0].double().log_softmax(-1).gather(-1, top) - log_probs
        row |= {
            "other_losses": token_losses(other, labels),
            "other_same": other[0].argmax(-1) == expected[0].argmax(-1),
            "noise": differences.square().mean().sqrt().float(),
            "rounding": (other - expected).abs().max().float(),
        }
    return row


def first_sequences(reference: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The first `count` sequences."""
    return {name: tensor[:count] for name, tensor in reference.items()}


def simulated_logits(simulation: Reference) -> tuple[Logits, Logits]:
    """Logits of a simulation, and with other, equally valid rounding."""
    primary = simulation.graph().interface.primary
    return (
        lambda ids: simulation.outputs({"input_ids": ids})[primary],
        lambda ids: simulation.perturbed_outputs({"input_ids": ids})[primary],
    )


def logits_of(model: PeftModel, rounding: Rounding | None = None) -> dict[str, Logits]:
    """Logits of a base with an adapter, without it and with it, computed inside `rounding`."""

    def base(ids: Tensor) -> Tensor:
        with model.disable_adapter():
            return whole(ids)

    def whole(ids: Tensor) -> Tensor:
        with rounding or nullcontext():
            return model(input_ids=ids).logits.float()

    return {"base": base, "adapter": whole}


def reference_of_trained(
    model: PeftModel, sequences: Sequences, rounding: Rounding | None
) -> dict[str, Tensor]:
    """The reference that a base with an adapter gives, for a runtime with this `rounding`."""
    # A runtime that cannot compute without rounding is compared with the model rounded alike; what
    # another valid rounding changes is the noise. For others, rounding is a tolerance.
    if rounding is not None and rounding.other is not None:
        rounded, perturbed = logits_of(model, rounding), logits_of(model, rounding.other)
        reference = make_reference(rounded, sequences, perturbed, least_noise=LEAST_FLIP)
        return reference | trained_losses(model, sequences)
    tolerance = None if rounding is None else logits_of(model, rounding)
    return make_reference(logits_of(model), sequences, rounded=tolerance)


def trained_losses(model: PeftModel, sequences: Sequences) -> dict[str, Tensor]:
    """What a reference has of a model that is not rounded."""
    exact = make_reference(logits_of(model), sequences)
    return {f"{state}.trained_losses": exact[f"{state}.losses"] for state in STATES}


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each token given those before it; 0 for those not in the loss."""
    return torch.nn.functional.cross_entropy(
        logits[0, :-1].double(), labels[1:], ignore_index=IGNORED, reduction="none"
    )


def logits_checks(figures: Mapping[str, Any], limits: Limits, where: str = "") -> list[Check]:
    """The checks of `compare_logits`; `where` is a part of a sentence, such as " on the HTP"."""
    rows = []
    if not math.isfinite(figures["max_log_prob_difference"]):
        rows.append(at_most(f"largest logit{where}", math.nan, math.inf))
    if "perplexity" in figures:
        both = figures["perplexity"], figures["reference_perplexity"]
        drift = abs(both[0] / both[1] - 1) if all(map(math.isfinite, both)) else math.nan
        allowed = limits.perplexity_difference + figures["floor_perplexity_difference"]
        rows.append(at_most(f"difference of perplexity{where}", drift, allowed, "share"))
        if "rounding_floor" in figures:
            drift = abs(both[1] / figures["trained_perplexity"] - 1)
            allowed = limits.perplexity_difference + figures["rounding_floor"]
            what = f"difference of perplexity by rounded floats{where}"
            rows.append(at_most(what, drift, allowed, "share"))
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

    It compares log-probabilities of the likeliest tokens, the likeliest token, and perplexity.
    Where the reference has an `other` computation, that is a noise floor: no file can agree with a
    simulation better than two equally correct simulations agree with each other.

        rounding    a log-probability may also differ by twice the largest difference of a logit
        noise       a single one by any amount, the root mean square by NOISE times the floor's
        perplexity  by what the recipe allows plus exp(1.96 sqrt(sum_t d_t^2) / n) - 1, which 95 %
                    of samples stay below: d_t is the difference of two simulations in the
                    log-likelihood of token t of n

    The divergence counts all tokens that are not among the likeliest as one:

        KL = sum_i p_i log(p_i / q_i) + r log(r / s),    r = 1 - sum_i p_i,  s = 1 - sum_i q_i

    If files hold rounded floats, the perplexity of the model that is rounded alike may differ from
    that of the trained one by as much, with the d_t of these two.

    NaN and infinity are never within a limit. If only some tokens count for the loss, the logits
    that predict those are compared.

    Args:
        last: compare the last tokens of each sequence only, whose logits `logits` returns.

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
        computed = logits(ids[None]).double()
        top = reference[f"{state}.top"][number, part].long()
        check_ids(top, computed.shape[-1])
        log_probs = computed[0].log_softmax(-1)
        expected = reference[f"{state}.log_probs"][number, part].double()
        at = log_probs.gather(-1, top)
        most = max(most, largest((at - expected)[predicting].abs()))
        if not bool(computed.isfinite().all()):  # also at tokens that are not compared
            most = math.inf
        differences.append((at - expected)[predicting])
        same += int((log_probs.argmax(-1) == top[:, 0])[predicting].sum())
        divergence += float(_divergence(expected, at)[predicting].sum())
        if last is None:
            nll += float(token_losses(computed, labels).sum())
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
        if (trained := reference.get(f"{state}.trained_losses")) is not None:
            figures["trained_perplexity"] = perplexity(float(trained.sum()), counted)
            if f"{state}.noise" not in reference:  # else the runtime rounds, which no option avoids
                change = trained - reference[f"{state}.losses"]
                floor = perplexity_floor(float(change.square().sum()), counted)
                figures["rounding_floor"] = floor
    figures |= {"tokens": tokens, "sequences": len(rows)}
    figures |= _floor(reference, state, masks, part, counted)
    return Parity(figures, tuple(logits_checks(figures, limits, where)))


def _predicting(labels: Tensor) -> Tensor:
    """The tokens whose logits predict one that counts in the loss."""
    mask = (labels != IGNORED).roll(-1)
    # Nothing follows the last token. Its logits are compared if it counts itself.
    mask[-1] = labels[-1] != IGNORED
    return mask


def _floor(
    reference: Mapping[str, Tensor], state: str, compared: list[Tensor], part: slice, counted: int
) -> dict[str, float]:
    agreement, drift = AGREEMENT, 0.0
    if (same := reference.get(f"{state}.other_same")) is not None:
        shares = [row[part][mask] for row, mask in zip(same, compared, strict=True)]
        agreement = lowest_agreement(torch.cat(shares))
        change = reference[f"{state}.other_losses"] - reference[f"{state}.losses"]
        drift = perplexity_floor(float(change.square().sum()), counted)
    floor = {"floor_top1_agreement": agreement, "floor_perplexity_difference": drift}
    # Twice: a log-probability is a logit minus a mean of logits, and both may differ.
    exact = 2 * LOGIT_DIFFERENCE * float(reference[f"{state}.largest"].max())
    if (noise := reference.get(f"{state}.noise")) is not None:
        return {**floor, "noise_allowed": exact + NOISE * _rms(noise.double())}
    rounding = reference.get(f"{state}.rounding")
    coarse = 0.0 if rounding is None else 2 * float(rounding.max())
    return {**floor, "largest_allowed": exact + coarse}


def lowest_agreement(same: Tensor) -> float:
    """Lower end of the 95 % interval (Wilson) for the share in another sample of the same size."""
    # Both are samples, so their difference has the variance of a sample half as large.
    n, share, z = len(same) / 2, float(same.double().mean()), 1.96
    center = share + z * z / (2 * n)
    margin = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (center - margin) / (1 + z * z / n)


def perplexity_floor(squared_noise: float, tokens: int) -> float:
    """Relative difference of perplexity that rounding explains in 95 % of samples.
    `squared_noise` is the sum over tokens of d_t^2; see `compare_logits`."""
    try:
        return math.expm1(1.96 * math.sqrt(squared_noise) / tokens)
    except OverflowError:
        return math.inf


def perplexity(nll: float, tokens: int) -> float:
    """`exp(nll / tokens)`; infinite if that overflows, NaN if `nll` is or there are no tokens."""
    try:
        return math.exp(nll / tokens) if tokens else math.nan
    except OverflowError:
        return math.inf


def largest(differences: Tensor) -> float:
    """The largest of absolute differences; infinite if one is NaN, 0 if there is none."""
    if not differences.numel():
        return 0.0
    # torch's max, unlike Python's, is NaN if any value is.
    value = float(differences.max())
    return math.inf if math.isnan(value) else value


def compare_first(
    reference: Mapping[str, Tensor], runtime: Runtime, limits: Limits, where: str
) -> Parity:
    """`compare_logits` of the first sequence, its last tokens one by one: for slow programs."""
    first = first_sequences(reference, 1)
    steps = min(SLOW_STEPS, first["ids"].shape[1] - 1)
    return compare_logits(partial(runtime.logits, steps=steps), first, limits, where=where)


def is_same(logits: Tensor, other: Tensor) -> bool:
    """Whether two results are equal, including where both hold NaN."""
    return logits.allclose(other, rtol=0, atol=0, equal_nan=True)


def _rms(differences: Tensor) -> float:
    return float(differences.square().mean().sqrt())


def _divergence(expected: Tensor, log_probs: Tensor) -> Tensor:
    """KL of each row, in nats; see `compare_logits`."""
    p, rest = expected.exp(), (1 - expected.exp().sum(-1)).clamp_min(0)
    # Rounding may leave nothing of s, which must not make the divergence infinite.
    other = (1 - log_probs.exp().sum(-1)).clamp_min(torch.finfo(torch.float64).tiny)
    tail = torch.where(rest > 0, rest * (rest.clamp_min(1e-300).log() - other.log()), 0.0)
    return (p * (expected - log_probs)).sum(-1) + tail


def is_told_apart(reference: Mapping[str, Tensor], limits: Limits) -> bool:
    """Whether a runtime that computes the base instead of the adapter would break a limit; True if
    the reference has no base."""
    if "base.losses" not in reference:
        return True
    few = first_sequences(reference, len(reference["base.top"]))
    # The likeliest tokens of both may differ, so log-probabilities of the text's own are compared.
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


def check_reference(reference: Mapping[str, Tensor]) -> None:
    """Raises SourceError: a tensor is missing, has another type or size, or holds what no model
    says."""
    if problems := list(_problems(reference)):
        raise SourceError(
            f"reference.safetensors proves nothing: {listed(problems)}. Copy the bundle again from "
            "whoever exported it, or verify the job again"
        )


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raises SourceError: there are token ids that the runtime's model does not have."""
    if int(ids.max()) >= vocabulary:
        raise SourceError(
            f"reference.safetensors has token {int(ids.max())}, and the model a vocabulary of "
            f"{vocabulary:,} tokens: one of them is of another model. Copy the bundle again"
        )


def _problems(reference: Mapping[str, Tensor]) -> Iterator[str]:
    ids = reference.get("ids", torch.empty(0))
    if ids.dtype != torch.int64 or ids.ndim != 2 or len(ids) < 1 or ids.shape[1] < 2:
        yield f"ids are {_form(ids)}, not int64 [1 or more sequences, 2 or more tokens]"
        return
    has_base = any(name.startswith("base.") for name in reference)
    states, forms = STATES if has_base else ("adapter",), {"ids": _form(ids), "labels": _form(ids)}
    for state in states:
        forms |= _forms(state, ids, reference)
    given = {name: _form(tensor) for name, tensor in reference.items()}
    wrong = [name for name in sorted(forms | given) if given.get(name) != forms.get(name)]
    if wrong:
        shown = (f"{n} is {given.get(n, 'missing')}, not {forms.get(n, 'known')}" for n in wrong)
        yield listed(shown)
        return
    if int(ids.min()) < 0:
        yield "ids are negative"
    counted = reference["labels"] != IGNORED
    if not bool(counted[:, 1:].any()) or bool((reference["labels"] != ids)[counted].any()):
        yield "labels count no token, or others than ids has"
    for state in states:
        parts = {n.partition(".")[2]: t for n, t in reference.items() if n.startswith(f"{state}.")}
        yield from (f"{state}: {problem}" for problem in _wrong_values(parts))


def _forms(state: str, ids: Tensor, reference: Mapping[str, Tensor]) -> dict[str, str]:
    rows = min(len(ids), BASE_SEQUENCES) if state == "base" else len(ids)
    tokens, likeliest = ids.shape[1], reference.get(f"{state}.top", ids)
    top = likeliest.shape[-1] if likeliest.ndim else 0
    forms = {
        "top": f"int32 [{rows}, {tokens}, {top}]",
        "log_probs": f"float32 [{rows}, {tokens}, {top}]",
        "losses": f"float64 [{rows}, {tokens - 1}]",
        "largest": f"float32 [{rows}]",
    }
    names = ("other_losses", "other_same", "noise", "rounding")
    if any(f"{state}.{name}" in reference for name in names):
        bound = "rounding" if f"{state}.rounding" in reference else "noise"
        forms |= {
            "other_losses": f"float64 [{rows}, {tokens - 1}]",
            "other_same": f"bool [{rows}, {tokens}]",
            bound: f"float32 [{rows}]",
        }
    if f"{state}.trained_losses" in reference:
        forms["trained_losses"] = forms["losses"]
    return {f"{state}.{name}": form for name, form in forms.items()}


def _wrong_values(parts: Mapping[str, Tensor]) -> Iterator[str]:
    # Only what no model says. An `other` computation may overflow: then nothing passes.
    if not parts["top"].numel():
        yield "top is empty"
        return
    for name in ("log_probs", "losses", "largest", "trained_losses"):
        if name in parts and not bool(parts[name].isfinite().all()):
            yield f"{name} holds NaN or infinity"
            return
    total = parts["log_probs"].double().exp().sum(-1)
    if float(total.max()) > 1 + TOLERANCE or float(parts["losses"].min()) < -TOLERANCE:
        yield "log_probs or losses are not log-probabilities"
    for name in ("top", "largest", "noise", "rounding", "other_losses"):
        if name in parts and bool((parts[name] < -TOLERANCE).any()):
            yield f"{name} holds negative numbers"


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
