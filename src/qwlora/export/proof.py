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
the likeliest token may differ by as much, and a log-probability by any amount. Of the tokens that
are decoded one by one, as many may differ as 97.5 % of samples of that size would keep at the noise
floor. Where a runtime rounds activations (`WeightsTarget.rounding`), the floor is what that does to
the model, a log-probability included. Speeds are of one run on this machine, one sequence at a
time.
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

from qwlora.data.sequences import Sequences
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
from qwlora.system.memory import peak_rss_bytes, reset_peak_rss
from qwlora.system.processor import processor_name

TOP = 64
SEQUENCES = 2  # a bundle need not hold more to be proven again
DECODED = 16  # tokens
SWITCHES = 3  # measured; the fastest counts
DECODE_AGREEMENT = 0.9  # one of 16 may be as likely as another, up to rounding
STATES = ("base", "adapter")
Logits = Callable[[Tensor], Tensor]  # of token ids [1, tokens]


@torch.no_grad()
def make_reference(
    logits: Mapping[str, Logits],
    sequences: Sequences,
    perturbed: Mapping[str, Logits] | None = None,
    rounded: Mapping[str, Logits] | None = None,
) -> dict[str, Tensor]:
    """The reference that the trained model gives for a few sequences.

    Args:
        logits: by state, without the adapter and with it, or with it only.
        perturbed: the same with other, equally valid rounding, for models on a grid.
        rounded: the same with a runtime's rounding of activations, for other models.
    """
    others = perturbed or rounded
    few = sequences.first(SEQUENCES)
    found = {"ids": few.input_ids, "labels": few.labels}
    for state in logits:
        parts: dict[str, list[Tensor]] = {"top": [], "log_probs": [], "losses": [], "largest": []}
        floor = NoiseFloor()
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
                floor.update_losses(token_losses(other, labels), losses)
        found |= {f"{state}.{name}": torch.stack(tensors) for name, tensors in parts.items()}
        if others is not None:
            noise = perplexity_floor(floor.squared_noise, few.loss_tokens)
            found[f"{state}.floor"] = torch.tensor([floor.lowest_agreement, noise])
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
    reset_peak_rss()
    before, began = peak_rss_bytes(), time.perf_counter()
    runtime = target.open(base)
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - began}
    found["exact"] = _run(runtime, adapter, reference)
    if runtime.shipped is not None:
        found["shipped"] = _run(runtime.shipped, adapter, reference)
    found["peak_memory_bytes"] = peak_rss_bytes() - before
    found["bytes"] = {"base": _bytes(base), "adapter": _bytes(adapter)}
    return found


def measure_logits(logits: Logits, reference: Mapping[str, Tensor]) -> dict[str, Any]:
    """`measure` of files that hold base and adapter together: figures of `adapter` only."""
    return {"exact": {"adapter": _compare(logits, reference, "adapter")}}


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
        allowed = 2 * LOGIT_DIFFERENCE * float(reference[f"{state}.largest"].max())
        agreement = AGREEMENT
        if (floor := reference.get(f"{state}.floor")) is not None:
            rounding = float(reference.get(f"{state}.rounding", math.inf))
            allowed, agreement = allowed + 2 * rounding, float(floor[0])
            if f"{state}.rounding" in reference and not math.isfinite(rounding):
                yield UNBOUNDED
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
    for number, (ids, labels) in enumerate(zip(reference["ids"], reference["labels"], strict=True)):
        logits = logits_of(ids[None]).double()
        found = logits[0].log_softmax(-1)
        top = reference[f"{state}.top"][number].long()
        expected = reference[f"{state}.log_probs"][number].double()
        at = found.gather(-1, top)
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
        "top1_agreement": same / tokens,
        "kl_divergence": divergence / tokens,
        "perplexity": perplexity(nll, counted),
        "reference_perplexity": perplexity(expected_nll, counted),
        "tokens": tokens,
    }


def _divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL of each row, in nats; see the module."""
    p, rest = expected.exp(), (1 - expected.exp().sum(-1)).clamp_min(0)
    other = (1 - found.exp().sum(-1)).clamp_min(torch.finfo(torch.float64).tiny)
    tail = torch.where(rest > 0, rest * (rest.clamp_min(1e-300).log() - other.log()), 0.0)
    return (p * (expected - found)).sum(-1) + tail


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
