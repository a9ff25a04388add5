"""Tune the scales of a quantized model against its float model; no code changes.

    minimize over f    mean over tokens  KL( softmax(g_t) || softmax(h_t) )
    W_hat = (1 + f) * scale * (q + offset),    gain_hat = (1 + f) * gain

g and h are the logits of the float and the quantized model; f is one number per scale and per
channel of a norm, starting at zero, trained by AdamW with a cosine schedule. Memory: both models,
the activations of one sequence and some copies of its logits (at most 512 positions). A step takes
about as long as a training step of an adapter.

`tuned_parameters.py` says which scales and norms.

Sources: the second phase of EfficientQAT (Chen et al. 2024, https://arxiv.org/abs/2407.11062), here
with the float model's distribution as target instead of the text. For norms: norm tweaking (Li et
al. 2023, https://arxiv.org/abs/2309.02784).
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwlora.errors import CalibrationError, GridError
from qwlora.graph.call_arguments import arguments_of
from qwlora.nn.fingerprint import adapter_fingerprint, fingerprint, remember_base_, update_digest
from qwlora.nn.temporary import evaluation_mode, gradients_disabled
from qwlora.quantize.block_runner import Batches
from qwlora.quantize.quantize_blocks import batches_of, named_inputs, read_keyed
from qwlora.quantize.solvers import REVISIONS
from qwlora.quantize.tuned_parameters import Tunable
from qwlora.system.atomic import write_tensors
from qwlora.system.device import device_of, moved, onednn_float32_matmul
from qwlora.system.machine import SlowComputeWarning, auto_compute, slow_compute
from qwlora.system.parameter_names import canonical_name
from qwlora.system.progress import Track, untracked

HELD_OUT_SEQUENCES = 8  # or a quarter of all sequences, whichever is less
_LARGEST_CHANGE = 0.5  # relative change of a tuned value
_POSITIONS = 512  # most positions of a sequence at which logits are compared
_WARMUP = 5  # steps
_CLIP = 1.0  # norm of the gradient
# A step takes a second or an hour, so checkpoints are written by the clock: every minute, or after
# this multiple of the writing time. A checkpoint has three float32 numbers per tuned number.
_SECONDS_BETWEEN, _TIMES_WRITING = 60.0, 20


@dataclass(frozen=True)
class TuningSettings:
    """Settings of `tune_`.

    Args:
        steps: number of steps, one sequence each.
        learning_rate: peak rate, relative to the tuned value. A scale shared by n weights of b bits
            learns at `min(1, sqrt(n) / 2^b)` times the rate.
        compute: "float32", "bfloat16" (by autocast), or "auto": bfloat16 if the model's device has
            instructions for it, else float32.
        seed: seed for the order of sequences.
    """

    steps: int = 128
    learning_rate: float = 3e-3
    compute: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class TuningReport:
    """The result of tuning.

    Args:
        before, after: KL divergence from the float model's next-token distribution, in nats, on the
            held-out sequences.
        solver_scales: the layers' scales before tuning, by canonical path, if `kept`.
    """

    layers: int  # whose scales were tuned
    norms: int  # whose weights were tuned
    before: float
    after: float
    kept: bool  # whether the tuned values are in the model
    resumed_from_step: int = 0
    solver_scales: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)


def tune_(
    model: nn.Module,
    teacher: nn.Module,
    calibration: Tensor | Iterable[Any],
    settings: TuningSettings | None = None,
    *,
    work: Path | None = None,
    track: Track = untracked,
) -> TuningReport:
    """Tune scales of packed linear layers and weights of norms in place, to match the logits of
    `teacher`. The tuned values are kept only if held-out sequences improve.

        minimize    mean over tokens  KL( softmax(teacher) || softmax(model) ),  in nats

    Args:
        model: the quantized base.
        teacher: the float model.
        calibration: token ids [sequences, tokens], or batches as a DataLoader gives them (dicts,
            tensors, tuples); at least two.
        work: a folder for checkpoints; the same call with the same number of threads resumes from
            there and ends with the same bits.

    Returns:
        The divergence before and after, and whether the tuned values were kept.

    Raises:
        GridError: no linear layer is packed.
        CalibrationError: the models or the data do not fit each other, or the divergence is NaN.
    """
    settings = settings or TuningSettings()
    device = device_of(model)
    if problem := slow_compute(settings.compute, device.type):
        warnings.warn(problem, SlowComputeWarning, stacklevel=2)
    if settings.compute == "auto":
        settings = replace(settings, compute=auto_compute(device.type))
    tuned = Tunable(model)
    if not tuned.layers:
        raise GridError("no layer of class Linear or Conv1D is packed; quantize before tuning")
    of_teacher = {id(parameter) for parameter in teacher.parameters()}
    if shared := [name for name, norm in tuned.norms.items() if id(norm.weight) in of_teacher]:
        raise CalibrationError(
            f"the quantized model and the float one share the weight of {shared[0]!r}, which is "
            "tuned; quantize a deep copy of the float model"
        )
    batches = moved(batches_of(calibration, model), device)
    if len(batches) < 2:
        raise CalibrationError(
            "tuning scales takes at least two sequences: one is held out to check whether it helped"
        )
    # Shuffled, since the last ones of a mixture of texts can all be of one text.
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(settings.seed))
    batches = [batches[i] for i in order]
    count = len(batches) - min(HELD_OUT_SEQUENCES, max(1, len(batches) // 4))
    training, held_out = batches[:count], batches[count:]
    checkpoint = None
    if work is not None:
        checkpoint = work / "tuning.safetensors", _key(settings, batches, model, teacher)
    both = nn.ModuleList([model, teacher])
    with evaluation_mode(both), gradients_disabled(both), onednn_float32_matmul(device):
        before = _mean_divergence(model, teacher, held_out)
        with tuned.learning():
            resumed = _descend(tuned, model, teacher, training, settings, checkpoint, track)
        old, kept = tuned.state(), False
        scales = {canonical_name(n): layer.tensor.parts.scale for n, layer in tuned.layers.items()}
        # Tuning can fail, so held-out sequences decide, in float32.
        try:
            tuned.multiply_()
            after = _mean_divergence(model, teacher, held_out)
            kept = after < before
        finally:
            if not kept:
                tuned.restore_(old)
    if kept:
        remember_base_(model)  # norms were tuned
    layers, norms = len(tuned.layers), len(tuned.norms)
    return TuningReport(layers, norms, before, after, kept, resumed, scales if kept else {})


def _key(settings: TuningSettings, batches: Batches, model: nn.Module, teacher: nn.Module) -> str:
    digest = hashlib.sha256()
    inputs = [
        REVISIONS["tune_scales"],
        settings,
        *named_inputs(batches),
        adapter_fingerprint(model),
    ]
    for part in (model, teacher):
        inputs += [fingerprint(part), sorted({str(p.dtype) for p in part.parameters()})]
    update_digest(digest, inputs)
    return digest.hexdigest()


def _descend(
    tuned: Tunable,
    model: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    settings: TuningSettings,
    checkpoint: tuple[Path, str] | None,
    track: Track,
) -> int:
    """Minimize the divergence with AdamW, one sequence per step, none repeated until all are used.
    Returns the number of steps in the saved state of an unfinished call; `checkpoint` is its file
    and key."""
    generator = torch.Generator().manual_seed(settings.seed)
    by_rate = tuned.by_rate(settings.learning_rate)
    factors = [factor for group in by_rate.values() for factor in group]
    optimizer = torch.optim.AdamW(
        [{"params": group, "peak": rate} for rate, group in by_rate.items()], weight_decay=0
    )
    order, resumed, steps = list[int](), 0, settings.steps
    if checkpoint is not None and (stored := read_keyed(*checkpoint)) is not None:
        tensors, _ = stored
        order, resumed = tensors["order"].tolist(), int(tensors["done"])
        generator.set_state(tensors["generator"])
        for i, factor in enumerate(factors):
            factor.data.copy_(tensors[f"factor/{i}"])
            moments = {key: tensors[f"{key}/{i}"].to(factor) for key in ("exp_avg", "exp_avg_sq")}
            # AdamW counts steps on the CPU.
            optimizer.state[factor] = {"step": tensors[f"step/{i}"], **moments}
    due = monotonic() + _SECONDS_BETWEEN
    for step in track(range(resumed, steps), "tuning scales", steps - resumed):
        if not order:
            order = torch.randperm(len(batches), generator=generator).tolist()
        loss = _divergence(model, teacher, batches[order.pop()], settings.compute, generator)
        if not bool(torch.isfinite(loss)):
            raise CalibrationError(
                f"tuning scales: the divergence is {float(loss.detach())} at step {step + 1}; "
                "use a lower learning rate, or compute: float32"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, _CLIP)
        warmup = min(1, (step + 1) / min(_WARMUP, steps))
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = group["peak"] * (warmup * cosine)
        optimizer.step()
        for factor in factors:
            factor.data.clamp_(-_LARGEST_CHANGE, _LARGEST_CHANGE)
        if checkpoint is not None and (began := monotonic()) >= due:
            state = {
                "order": torch.tensor(order, dtype=torch.int64),
                "done": torch.tensor(step + 1),
                "generator": generator.get_state(),
            }
            for i, factor in enumerate(factors):
                values = {"factor": factor.detach(), **optimizer.state[factor]}
                state |= {f"{name}/{i}": value for name, value in values.items()}
            write_tensors(checkpoint[0], state, {"key": checkpoint[1]})
            now = monotonic()
            due = now + max(_SECONDS_BETWEEN, _TIMES_WRITING * (now - began))
    return resumed


def _divergence(
    model: nn.Module,
    teacher: nn.Module,
    batch: Mapping[str, Any],
    compute: str,
    generator: torch.Generator,
) -> Tensor:
    """Mean KL in nats over the batch's positions, or over some of them if there are many."""
    arguments = set(arguments_of(model)) & set(arguments_of(teacher))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    has_decoder = "decoder_input_ids" in inputs
    mask = inputs.get("decoder_attention_mask" if has_decoder else "attention_mask")
    ids = inputs.get("input_ids")
    if "use_cache" in arguments:
        inputs["use_cache"] = False
    if "logits_to_keep" in arguments and isinstance(ids, Tensor) and not has_decoder:
        count = ids.shape[-1]
        if count > _POSITIONS:
            chosen = torch.randperm(count, generator=generator)[:_POSITIONS].sort().values
            inputs["logits_to_keep"] = chosen = chosen.to(ids.device)
            mask = mask[:, chosen] if isinstance(mask, Tensor) and mask.ndim == 2 else mask
    h = _logits(model, inputs, compute)
    with torch.no_grad():
        g = _logits(teacher, inputs, compute)
    if g.shape != h.shape:
        raise CalibrationError(
            f"the float model's logits are {list(g.shape)}, the quantized one's {list(h.shape)}: "
            "give two versions of the same model"
        )
    divergence = F.kl_div(
        h.float().log_softmax(-1), g.float().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    if not isinstance(mask, Tensor) or mask.shape != divergence.shape:
        return divergence.mean()
    real = mask.to(divergence)
    return (divergence * real).sum() / real.sum().clamp(min=1)


@torch.no_grad()
def _mean_divergence(model: nn.Module, teacher: nn.Module, batches: Batches) -> float:
    # In float32 and at the same positions, so that before and after can be compared.
    means = [
        _divergence(model, teacher, batch, "float32", torch.Generator().manual_seed(0))
        for batch in batches
    ]
    return float(torch.stack(means).mean())


def _logits(model: nn.Module, inputs: Mapping[str, Any], compute: str) -> Tensor:
    with torch.autocast(device_of(model).type, torch.bfloat16, enabled=compute == "bfloat16"):
        logits = getattr(model(**inputs), "logits", None)
    if not isinstance(logits, Tensor):
        raise CalibrationError(
            f"tuning scales compares logits, but {type(model).__name__} returns none; remove tuning"
        )
    return logits
