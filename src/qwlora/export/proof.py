"""What a bundle of base and adapters is proven with, on any machine, without the training job.

A bundle is the folder export/TARGET: base/, NAME/ for each adapter, proof/NAME/, README.md. Files
that hold base and adapter together (`GraphTarget`, `UseCasesTarget`) have a proof with the adapter
only.

    reference.safetensors    tokens, and what the model says about them: the trained one, or its
                             simulation where activations are on grids
    proof.json               figures, limits, and which base and adapter they are of

The reference holds, without the adapter and with it, for each token the log-probabilities of the
TOP likeliest next tokens and the loss. The Kullback-Leibler divergence of a runtime from it counts
all other tokens as one:

    KL = sum_i p_i log(p_i / q_i) + r log(r / s),    r = 1 - sum_i p_i,  s = 1 - sum_i q_i

Log-probabilities may differ by twice LOGIT_DIFFERENCE of the largest logit, since they are a logit
minus a mean of logits. On a grid the last bit of one layer can become a whole step of a later one,
so for simulated activations the reference also has the noise floor of `verify.py`: perplexity and
the likeliest token may differ by as much. A single log-probability may then differ by any amount,
but the root mean square of all differences only by NOISE times that of the floor. Measured with 4
layers on grids of 16 bits: 1 time the floor, and 60 times if ONNX Runtime rounds the activations of
4-bit weights to 8 bits. Of the tokens that are decoded one by one, as many may differ as 97.5 % of
samples of that size would keep at the noise floor. Where a runtime rounds activations
(`WeightsTarget.rounding`), the floor is what that does to the model, a log-probability included.
Speeds are of one run on this machine, one sequence at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qwlora.data.sequences import IGNORED, Sequences
from qwlora.errors import SourceError
from qwlora.export.finite_figures import is_same, largest, perplexity
from qwlora.export.target import BundleTarget, Target
from qwlora.export.verify import (
    NoiseFloor,
    largest_drift,
    perplexity_floor,
    token_losses,
)
from qwlora.export.verify_weights import (
    AGREEMENT,
    LOGIT_DIFFERENCE,
    UNBOUNDED,
    WeightsRuntime,
    other_perplexity,
)
from qwlora.messages import listed
from qwlora.system.memory import peak_rss_bytes, reset_peak_rss
from qwlora.system.processor import processor_name

TOP = 64
SEQUENCES = 2  # a bundle need not hold more to be proven again
DECODED = 16  # tokens
SWITCHES = 3  # measured; the fastest counts
DECODE_AGREEMENT = 0.9  # one of 16 may be as likely as another, up to rounding
STATES = ("base", "adapter")
NOISE = 4.0  # of the noise floor, which is itself the difference of one sample
SAME = "the base alone would pass as this adapter: its effect is below what is compared here"
TOLERANCE = 1e-3  # of sums of probabilities, from float32 logits
_PARTS = ("top", "log_probs", "losses", "largest")
Logits = Callable[[Tensor], Tensor]  # of token ids [1, tokens]


@torch.no_grad()
def make_reference(
    logits: Mapping[str, Logits],
    sequences: Sequences,
    perturbed: Mapping[str, Logits] | None = None,
    rounded: Mapping[str, Logits] | None = None,
    bitwidth: int = 16,
) -> dict[str, Tensor]:
    """The reference that the trained model gives for a few sequences.

    Args:
        logits: by state, without the adapter and with it, or with it only.
        perturbed: the same with other, equally valid rounding, for models on a grid.
        rounded: the same with a runtime's rounding of activations, for other models.
        bitwidth: of the coarsest grid of activations. Where no value of these few sequences falls
            on another step, half a step of the logits counts as the noise floor.
    """
    others = perturbed or rounded
    few = sequences.first(SEQUENCES)
    found = {"ids": few.input_ids, "labels": few.labels}
    for state in logits:
        parts: dict[str, list[Tensor]] = {"top": [], "log_probs": [], "losses": [], "largest": []}
        floor, noise = NoiseFloor(), list[Tensor]()
        for ids, labels in zip(few.input_ids, few.labels, strict=True):
            expected = logits[state](ids[None])
            losses = token_losses(expected, labels)
            values, top = expected[0].double().log_softmax(-1).topk(min(TOP, expected.shape[-1]))
            parts["top"].append(top.int())
            parts["log_probs"].append(values.float())
            parts["losses"].append(losses)
            parts["largest"].append(expected.abs().max())
            if others is not None:
                other = others[state](ids[None])
                floor.update(other, expected)
                noise.append(other[0].double().log_softmax(-1).gather(-1, top) - values)
                floor.update_losses(token_losses(other, labels), losses)
        found |= {f"{state}.{name}": torch.stack(tensors) for name, tensors in parts.items()}
        if others is not None:
            allowed = perplexity_floor(floor.squared_noise, few.loss_tokens)
            found[f"{state}.floor"] = torch.tensor([floor.lowest_agreement, allowed])
        if perturbed is not None:
            half_step = float(found[f"{state}.largest"].max()) / 2**bitwidth
            found[f"{state}.noise"] = _rms(torch.stack(noise)).clamp_min(half_step)
        if rounded is not None:
            found[f"{state}.rounding"] = torch.tensor(floor.largest)
    return found


def logits_of(
    model: PeftModel, rounding: AbstractContextManager[None] | None = None
) -> dict[str, Logits]:
    """Logits of a base with an adapter, without it and with it, computed inside `rounding`."""

    def base(ids: Tensor) -> Tensor:
        with model.disable_adapter():
            return whole(ids)

    def whole(ids: Tensor) -> Tensor:
        with rounding or nullcontext():
            logits: Tensor = model(input_ids=ids).logits
        return logits

    return {"base": base, "adapter": whole}


def measure(
    target: BundleTarget, base: Path, adapter: Path, reference: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Run a bundle's base without, with and without an adapter, with exact settings and as shipped.

    Returns:
        `exact`, and `shipped` where it differs: figures of `base` and `adapter`, whether switching
        the adapter off gives the bits of before, seconds and tokens per second. Also the seconds to
        load the base and the growth of this process's memory, of both together, and bytes of files.

    Raises:
        ExportError: the runtime refuses the files.
    """
    check_reference(reference)
    reset_peak_rss()
    before, began = peak_rss_bytes(), time.perf_counter()
    runtime = target.open(base)
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - began}
    _check_ids(reference["ids"], runtime.logits(torch.zeros(1, 1, dtype=torch.int64)).shape[-1])
    found["exact"] = _run(runtime, adapter, reference)
    if runtime.shipped is not None:
        found["shipped"] = _run(runtime.shipped, adapter, reference)
    found["peak_memory_bytes"] = peak_rss_bytes() - before
    found["bytes"] = {"base": _bytes(base), "adapter": _bytes(adapter)}
    return found


def measure_logits(logits: Logits, reference: Mapping[str, Tensor]) -> dict[str, Any]:
    """`measure` of files that hold base and adapter together: figures of `adapter` only."""
    check_reference(reference)
    return {"exact": {"adapter": _compare(logits, reference, "adapter")}}


def check_reference(reference: Mapping[str, Tensor]) -> None:
    """Refuse a reference that proves nothing.

    Raises:
        SourceError: a tensor is missing, has another type or size, or holds what no model says.
    """
    if problems := list(_reference_problems(reference)):
        raise SourceError(
            f"reference.safetensors proves nothing: {listed(problems)}. Copy the bundle again from "
            "whoever exported it, or verify the job again"
        )


def _reference_problems(reference: Mapping[str, Tensor]) -> Iterator[str]:
    ids, labels = (reference.get(name, torch.empty(0)) for name in ("ids", "labels"))
    if ids.dtype != torch.int64 or ids.ndim != 2 or len(ids) < 1 or ids.shape[1] < 2:
        yield f"ids are {_form(ids)}, not int64 [1 or more sequences, 2 or more tokens]"
        return
    if int(ids.min()) < 0:
        yield "ids are negative"
    counted = labels != IGNORED
    if labels.shape != ids.shape or labels.dtype != ids.dtype:
        yield f"labels are {_form(labels)}, and ids {_form(ids)}"
    elif not bool(counted[:, 1:].any()) or bool((labels != ids)[counted].any()):
        yield "labels count no token, or others than ids has"
    states = [state for state in STATES if any(n.startswith(f"{state}.") for n in reference)]
    if "adapter" not in states:
        yield "it holds nothing about the adapter"
    known = {"ids", "labels"}
    for state in states:
        parts = {name: reference.get(f"{state}.{name}", torch.empty(0)) for name in _PARTS}
        known |= {f"{state}.{name}" for name in parts}
        top, log_probs = parts["top"], parts["log_probs"]
        shapes = {
            "top": (*ids.shape, top.shape[-1] if top.ndim else 0),
            "log_probs": tuple(top.shape),
            "losses": (len(ids), ids.shape[1] - 1),
            "largest": (len(ids),),
        }
        wrong = [f"{state}.{n} {_form(parts[n])}" for n, s in shapes.items() if parts[n].shape != s]
        if wrong or not top.numel() or top.is_floating_point():
            yield f"sizes do not fit ids {_form(ids)}: {listed(wrong or [f'{state}.top'])}"
            continue
        floats = {name: tensor for name, tensor in parts.items() if name != "top"}
        if infinite := [n for n, tensor in floats.items() if not bool(tensor.isfinite().all())]:
            yield f"{state}.{listed(infinite)} hold NaN or infinity"
            continue
        total = log_probs.double().exp().sum(-1)
        if float(total.max()) > 1 + TOLERANCE or float(parts["losses"].min()) < -TOLERANCE:
            yield f"{state}.log_probs or losses are no log-probabilities"
        if int(top.min()) < 0 or float(parts["largest"].min()) < 0:
            yield f"{state}.top or largest are negative"
        floor = reference.get(f"{state}.floor")
        bounds = [
            reference[key] for n in ("rounding", "noise") if (key := f"{state}.{n}") in reference
        ]
        known |= {f"{state}.{name}" for name in ("floor", "rounding", "noise")}
        if (floor is None) != (not bounds) or len(bounds) > 1:
            yield f"{state} needs a floor with either noise or rounding, or none of them"
        elif floor is not None and (floor.shape != (2,) or bounds[0].ndim):
            yield f"{state}.floor is {_form(floor)}, and its noise {_form(bounds[0])}"
        elif floor is not None and (
            min(*floor.tolist(), float(bounds[0]), 1 - float(floor[0])) < 0
            or not math.isfinite(float(reference.get(f"{state}.noise", 0.0)))
        ):
            yield f"{state}.floor is {floor.tolist()}, its noise {float(bounds[0]):g}"
    if unknown := sorted(set(reference) - known):
        yield f"unknown tensors {listed(unknown)}"


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raises SourceError: there are ids that the runtime's model does not have."""
    if int(ids.max()) >= vocabulary:
        raise SourceError(
            f"reference.safetensors has token {int(ids.max())}, and the model a vocabulary of "
            f"{vocabulary:,} tokens: one of them is of another model. Copy the bundle again"
        )


def perplexity_limits(
    reference: Mapping[str, Tensor], perplexity_difference: float
) -> dict[str, float]:
    """The largest allowed relative difference of the perplexity, by state."""
    states = [state for state in STATES if f"{state}.top" in reference]
    floors = {s: reference.get(f"{s}.floor", torch.zeros(2)).tolist()[1] for s in states}
    return {s: largest_drift(perplexity_difference, floor) for s, floor in floors.items()}


def broken_limits(
    figures: Mapping[str, Any], reference: Mapping[str, Tensor], perplexity_difference: float
) -> Iterator[str]:
    """A sentence for each limit that exact settings exceed, or that switching off does not keep."""
    perplexities = perplexity_limits(reference, perplexity_difference)
    for state, limit in perplexities.items():
        found = figures["exact"][state]
        what = "with the adapter" if state == "adapter" else "without it"
        allowed = exact = 2 * LOGIT_DIFFERENCE * float(reference[f"{state}.largest"].max())
        agreement = AGREEMENT
        if (floor := reference.get(f"{state}.floor")) is not None:
            agreement = float(floor[0])
            allowed += 2 * float(reference.get(f"{state}.rounding", math.inf))
        if f"{state}.rounding" in reference and not math.isfinite(allowed):
            yield UNBOUNDED
        if (noise := reference.get(f"{state}.noise")) is not None:
            most = exact + NOISE * float(noise)
            rms = found["rms_log_prob_difference"]
            if math.isfinite(rms) and rms > most:
                yield (
                    f"log-probabilities {what} are off by {rms:.3g} (root mean square; limit "
                    f"{most:.3g})"
                )
        if not math.isfinite(found["max_log_prob_difference"]):
            yield f"logits {what} hold NaN or infinity"
        elif not found["max_log_prob_difference"] <= allowed:
            yield (
                f"a log-probability {what} is off by {found['max_log_prob_difference']:.3g} "
                f"(limit {allowed:.3g})"
            )
        if not found["top1_agreement"] >= agreement:
            yield (
                f"the likeliest token {what} is the same for {found['top1_agreement']:.2%} of "
                f"tokens (limit {agreement:.1%})"
            )
        yield from other_perplexity(
            found["perplexity"], found["reference_perplexity"], limit, f" {what}"
        )
    decoded, least = figures["exact"].get("decode_agreement", 1.0), DECODE_AGREEMENT
    if (floor := reference.get("adapter.floor")) is not None:
        least = min(least, _least_of_sample(float(floor[0]), DECODED))
    if not decoded >= least:
        yield (
            f"{decoded:.0%} of the tokens decoded one by one are the likeliest for the whole "
            f"sequence (limit {least:.0%})"
        )
    for settings in ("exact", "shipped"):
        if not figures.get(settings, {}).get("off_is_equal", True):
            yield f"after the adapter is switched off, logits differ from those before ({settings})"


def is_told_apart(reference: Mapping[str, Tensor], perplexity_difference: float) -> bool:
    """Whether a runtime that computes the base instead of the adapter would break a limit.

    True if the reference has no base. Of log-probabilities, those of the text's own tokens count.
    """
    if "base.losses" not in reference:
        return True
    base, adapter = reference["base.losses"].double(), reference["adapter.losses"].double()
    counted = int((reference["labels"][:, 1:] != IGNORED).sum())
    same = reference["base.top"][..., 0] == reference["adapter.top"][..., 0]
    figures = {
        "max_log_prob_difference": largest((base - adapter).abs()),
        "rms_log_prob_difference": float(_rms(base - adapter)),
        "top1_agreement": float(same.double().mean()),
        "perplexity": perplexity(float(base.sum()), counted),
        "reference_perplexity": perplexity(float(adapter.sum()), counted),
    }
    alone = {k: tensor for k, tensor in reference.items() if not k.startswith("base.")}
    limits = broken_limits({"exact": {"adapter": figures}}, alone, perplexity_difference)
    return next(limits, None) is not None


def _least_of_sample(share: float, count: int) -> float:
    """The share that 97.5 % of samples of `count` cases reach if it is `share` of all cases."""
    below = 0.0
    for found in range(count):
        below += math.comb(count, found) * share**found * (1 - share) ** (count - found)
        if below > 0.025:
            return found / count
    return 1.0


def client(target: Target) -> dict[str, str]:
    """Versions of the target's packages."""
    found = {}
    for package in target.packages:
        name = package.partition(".")[0].replace("_", "-")
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """The processor and the number of threads."""
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def _run(runtime: WeightsRuntime, adapter: Path, reference: Mapping[str, Tensor]) -> dict[str, Any]:
    first = reference["ids"][:1]
    runtime.use(None)
    found: dict[str, Any] = {"base": _compare(runtime.logits, reference, "base")}
    before = runtime.logits(first)
    runtime.use(adapter)
    found["adapter"] = _compare(runtime.logits, reference, "adapter")
    prompt = first[:, : max(1, first.shape[1] - DECODED)]
    began = time.perf_counter()
    runtime.logits(prompt)
    prefill = time.perf_counter() - began
    tokens = runtime.decode(prompt, DECODED)  # some runtimes load more for the first of all
    whole = torch.cat([prompt, torch.tensor([tokens])], dim=1)
    likeliest = runtime.logits(whole)[0, prompt.shape[1] - 1 : -1].argmax(-1)
    found["decode_agreement"] = float((likeliest == whole[0, prompt.shape[1] :]).float().mean())
    found["prefill_tokens_per_second"] = prompt.shape[1] / prefill
    found["decode_tokens_per_second"] = decode_speed(runtime, first[:, :1])
    runtime.use(None)
    found["off_is_equal"] = is_same(runtime.logits(first), before)
    found["switch_seconds"] = switch_seconds(runtime, adapter, first[:, :1])
    return found


def decode_speed(runtime: WeightsRuntime, token: Tensor) -> float:
    """Tokens per second, one by one with a cache, that follow one token [1, 1]."""
    began = time.perf_counter()
    runtime.decode(token, DECODED)
    return DECODED / (time.perf_counter() - began)


def switch_seconds(runtime: WeightsRuntime, adapter: Path, token: Tensor) -> float:
    """How much longer a token takes after a switch, to the adapter or off, whichever is slower;
    the runtime is left without an adapter.

    Some runtimes switch when they are told to, others when the next token is computed. The adapter
    has been read by now, where a runtime keeps adapters.
    """
    seconds: dict[tuple[Path | None, bool], list[float]] = {}
    for _ in range(SWITCHES):
        for state in (adapter, None):
            for is_switch in (True, False):
                began = time.perf_counter()
                if is_switch:
                    runtime.use(state)
                runtime.decode(token, 1)
                seconds.setdefault((state, is_switch), []).append(time.perf_counter() - began)
    least = {key: min(each) for key, each in seconds.items()}
    return max(0.0, *(least[state, True] - least[state, False] for state in (adapter, None)))


def _compare(logits_of: Logits, reference: Mapping[str, Tensor], state: str) -> dict[str, float]:
    """Figures of the runtime's logits. Where they hold NaN or infinity, the largest difference is
    infinite."""
    most, same, divergence, nll, tokens, counted = 0.0, 0, 0.0, 0.0, 0, 0
    differences = list[Tensor]()
    for number, (ids, labels) in enumerate(zip(reference["ids"], reference["labels"], strict=True)):
        logits = logits_of(ids[None]).double()
        found = logits[0].log_softmax(-1)
        top = reference[f"{state}.top"][number].long()
        expected = reference[f"{state}.log_probs"][number].double()
        _check_ids(top, logits.shape[-1])
        at = found.gather(-1, top)
        differences.append(at - expected)
        most = max(most, largest((at - expected).abs()))
        if not bool(logits.isfinite().all()):  # also of tokens that are not in the reference
            most = math.inf
        same += int((found.argmax(-1) == top[:, 0]).sum())
        divergence += float(_divergence(expected, at).sum())
        losses = token_losses(logits, labels)
        nll += float(losses.sum())
        tokens += len(ids)
        counted += int((labels[1:] >= 0).sum())
    expected_nll = float(reference[f"{state}.losses"].sum())
    return {
        "max_log_prob_difference": most,
        "rms_log_prob_difference": float(_rms(torch.stack(differences))),
        "top1_agreement": same / tokens,
        "kl_divergence": divergence / tokens,
        "perplexity": perplexity(nll, counted),
        "reference_perplexity": perplexity(expected_nll, counted),
        "tokens": tokens,
    }


def _rms(differences: Tensor) -> Tensor:
    return differences.square().mean().sqrt().float()


def _divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL of each row, in nats; see the module."""
    p, rest = expected.exp(), (1 - expected.exp().sum(-1)).clamp_min(0)
    other = (1 - found.exp().sum(-1)).clamp_min(torch.finfo(torch.float64).tiny)
    tail = torch.where(rest > 0, rest * (rest.clamp_min(1e-300).log() - other.log()), 0.0)
    return (p * (expected - found)).sum(-1) + tail


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
