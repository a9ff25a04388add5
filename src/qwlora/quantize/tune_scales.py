"""Tune the scales of a quantized model against its float model; no code changes.

    minimize over f    mean over tokens  KL( softmax(g_t) || softmax(h_t) )
    W_hat = (1 + f) * scale * (q + offset),    gain_hat = (1 + f) * gain

g and h are the logits of the float and the quantized model; f is one number per scale and per
channel of a norm, starting at zero, trained by AdamW with a cosine schedule. A solver makes each
layer's output right on its own; here the layers learn to compensate each other's errors. Memory:
both models, the activations of one sequence and some copies of its logits (at most 512 positions).
Time: about that of training an adapter for as many steps.

`tuned_parameters.py` says which scales and norms. Some sequences are held out: if the divergence on
them, in float32, does not fall, the model is restored.

Sources: the second phase of EfficientQAT (Chen et al. 2024, https://arxiv.org/abs/2407.11062), with
the float model's distribution instead of the text; norm tweaking (Li et al. 2023,
https://arxiv.org/abs/2309.02784) for the norms.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwlora.errors import CalibrationError, GridError
from qwlora.nn.fingerprint import (
    adapter_fingerprint,
    fingerprint,
    remember_floats_,
    update_digest,
)
from qwlora.nn.temporary import gradients_disabled
from qwlora.quantize.block_cache import named_inputs, read_keyed
from qwlora.quantize.quantize_blocks import arguments_of, batches_of
from qwlora.quantize.revisions import REVISIONS
from qwlora.quantize.tuned_parameters import Tunable
from qwlora.system.atomic import write_tensors
from qwlora.system.compute_precision import SlowComputeWarning, auto_compute, slow_compute
from qwlora.system.parameter_names import canonical_name
from qwlora.system.progress import Track, untracked

HELD_OUT_SEQUENCES = 8  # at most, and a quarter of all
_LARGEST_CHANGE = 0.5  # of a tuned value, relative
_POSITIONS = 512  # of a sequence at which logits are compared
_WARMUP = 5  # steps
_CLIP = 1.0  # norm of the gradient
_SECONDS_BETWEEN, _TIMES_WRITING = 60.0, 20  # of checkpoints


@dataclass(frozen=True)
class TuningSettings:
    """How a base is tuned.

    Args:
        steps: number of steps, one sequence each.
        learning_rate: peak rate, relative to the tuned value. A scale shared by n weights of b bits
            learns at `min(1, sqrt(n) / 2^b)` of the rate, because a change of the scale moves a
            weight by up to 2^(b - 1) times that change, and few weights give a noisy gradient.
        compute: "float32", "bfloat16" (by autocast), or "auto": bfloat16 if the model's device has
            instructions for it, else float32.
        seed: seed of the order of sequences.

    Raises:
        CalibrationError: a number is out of its range.
    """

    steps: int = 128
    learning_rate: float = 3e-3
    compute: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        is_known = self.compute in ("auto", "float32", "bfloat16")
        if self.steps < 1 or not 0 < self.learning_rate < 1 or not is_known:
            raise CalibrationError(
                "tuning takes at least 1 step, a learning rate between 0 and 1, and computes in "
                f"float32 or bfloat16, not {self.steps}, {self.learning_rate:g} "
                f"and {self.compute}"
            )


@dataclass(frozen=True)
class TuningReport:
    """The result of tuning.

    Args:
        layers: number of layers whose scales were tuned.
        norms: number of norms whose weights were tuned.
        before, after: divergence of the float model's next token from the quantized one's, in nats,
            on the held-out sequences.
        kept: whether the tuned values are in the model.
        resumed_from_step: 0, or the step after which an interrupted call resumed.
        solver_scales: the layers' scales before tuning, by canonical path, if `kept`. An adapter's
            initialization corrects the error of the solver.
    """

    layers: int
    norms: int
    before: float
    after: float
    kept: bool
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
    """Tune the scales of the packed linear layers and the weights of the norms in `model`, in
    place, so that its logits approach those of `teacher`.

    Args:
        teacher: the float model.
        calibration: token ids [sequences, tokens], or batches as a DataLoader gives them (dicts,
            tensors, tuples); at least two.
        work: a folder for checkpoints; the same call with the same number of threads resumes from
            there and ends with the same bits.

    Raises:
        GridError: no linear layer is packed.
        CalibrationError: there are fewer than two sequences, the two models share a norm, their
            logits are of different shapes, or the divergence is NaN.
        SafetensorError: `work` cannot be written to.
    """
    settings = _resolved(settings or TuningSettings(), model)
    tuned = Tunable(model)
    if not tuned.layers:
        raise GridError(
            "no linear layer of the model is packed, so there are no scales to tune; quantize it "
            "first"
        )
    of_teacher = {id(parameter) for parameter in teacher.parameters()}
    if shared := [name for name, norm in tuned.norms.items() if id(norm.weight) in of_teacher]:
        raise CalibrationError(
            f"the quantized model and the float one share the weight of {shared[0]!r}, which is "
            "tuned; quantize a deep copy of the float model"
        )
    batches = batches_of(calibration, model)
    if len(batches) < 2:
        raise CalibrationError(
            "tuning scales takes at least two sequences: one is held out to check whether it helped"
        )
    count = len(batches) - min(HELD_OUT_SEQUENCES, max(1, len(batches) // 4))
    training, held_out = batches[:count], batches[count:]
    divergence = _Divergence(model, teacher)
    checkpoint = _Checkpoint(work, _dependencies(settings, batches, model, teacher))
    with _evaluated(model), _evaluated(teacher):
        before = divergence.mean(held_out)
        with tuned.learning():
            descent = _Descent(tuned.by_rate(settings.learning_rate), settings)
            resumed = descent.run(divergence, training, checkpoint, track)
        old, kept = tuned.state(), False
        scales = {canonical_name(n): layer.tensor.parts.scale for n, layer in tuned.layers.items()}
        try:
            tuned.multiply_()
            after = divergence.mean(held_out)
            kept = after < before
        finally:
            if not kept:
                tuned.restore_(old)
    if kept:
        remember_floats_(model)  # norms were tuned
    layers, norms = len(tuned.layers), len(tuned.norms)
    return TuningReport(layers, norms, before, after, kept, resumed, scales if kept else {})


def _resolved(settings: TuningSettings, model: nn.Module) -> TuningSettings:
    """The settings with "auto" replaced by a precision; warns if the requested one is slow here."""
    device = next(model.parameters()).device.type
    if problem := slow_compute(settings.compute, device):
        warnings.warn(problem, SlowComputeWarning, stacklevel=3)
    if settings.compute == "auto":
        return replace(settings, compute=auto_compute(device))
    return settings


def _dependencies(
    settings: TuningSettings,
    batches: Sequence[Mapping[str, Any]],
    model: nn.Module,
    teacher: nn.Module,
) -> Iterator[Any]:
    """Everything that the result depends on."""
    yield from (REVISIONS["tune_scales"], settings, *named_inputs(batches))
    yield adapter_fingerprint(model)
    for part in (model, teacher):
        yield from (fingerprint(part), sorted({str(p.dtype) for p in part.parameters()}))


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients of parameters, inside the block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with gradients_disabled(model):
            yield
    finally:
        for module in training:
            module.training = True


class _Checkpoint:
    """The state of an unfinished tuning in a file: the same call resumes from it and ends with the
    same bits. Without a folder nothing is stored.

    The key is a digest of everything that the result depends on; a damaged file is ignored. The
    state is written by the clock, because a step may take a second or an hour: every minute, or
    after twenty times as long as writing takes. Its size is three float32 numbers per tuned number.
    """

    def __init__(self, folder: Path | None, dependencies: Iterable[Any]):
        self._file, self.key = None if folder is None else folder / "tuning.safetensors", ""
        if folder is not None:
            update_digest(digest := hashlib.sha256(), dependencies)
            self.key = digest.hexdigest()
        self._due = monotonic() + _SECONDS_BETWEEN

    def read(self) -> dict[str, Tensor] | None:
        """The state that the same call stored; None if it must start from the beginning."""
        stored = None if self._file is None else read_keyed(self._file, self.key)
        return None if stored is None else stored[0]

    def write(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """Store the result of `state` if it is time to."""
        if self._file is None or (began := monotonic()) < self._due:
            return
        write_tensors(self._file, state(), {"key": self.key})
        self._due = (now := monotonic()) + max(_SECONDS_BETWEEN, _TIMES_WRITING * (now - began))


class _Descent:
    """AdamW on the divergence, one sequence per step, none repeated until all are used."""

    def __init__(self, by_rate: Mapping[float, list[nn.Parameter]], settings: TuningSettings):
        self.steps, self.compute = settings.steps, settings.compute
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.factors = [factor for group in by_rate.values() for factor in group]
        groups = [{"params": group, "peak": rate} for rate, group in by_rate.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0)
        self.done, self.order = 0, list[int]()

    def run(
        self,
        divergence: _Divergence,
        batches: Sequence[Mapping[str, Any]],
        checkpoint: _Checkpoint,
        track: Track,
    ) -> int:
        """Run all steps, or those after the checkpoint; returns the number of the latter."""
        if (state := checkpoint.read()) is not None:
            self._restore_(state)
        resumed = self.done
        for step in track(range(resumed, self.steps), "tuning scales", self.steps - resumed):
            if not self.order:
                self.order = torch.randperm(len(batches), generator=self.generator).tolist()
            loss = divergence(batches[self.order.pop()], self.compute, self.generator)
            if not bool(torch.isfinite(loss)):
                raise CalibrationError(
                    f"tuning scales: the divergence is {float(loss.detach())} at step {step + 1}; "
                    "use a lower learning rate, or compute: float32"
                )
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.factors, _CLIP)
            warmup = min(1, (step + 1) / min(_WARMUP, self.steps))
            for group in self.optimizer.param_groups:
                cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
                group["lr"] = group["peak"] * (warmup * cosine)
            self.optimizer.step()
            with torch.no_grad():
                for factor in self.factors:
                    factor.clamp_(-_LARGEST_CHANGE, _LARGEST_CHANGE)
            self.done = step + 1
            checkpoint.write(self._state)
        return resumed

    def _state(self) -> dict[str, Tensor]:
        tensors = {
            "order": torch.tensor(self.order, dtype=torch.int64),
            "done": torch.tensor(self.done),
            "generator": self.generator.get_state(),
        }
        for i, factor in enumerate(self.factors):
            values = {"factor": factor.detach(), **self.optimizer.state[factor]}
            tensors |= {f"{name}/{i}": value for name, value in values.items()}
        return tensors

    @torch.no_grad()
    def _restore_(self, tensors: dict[str, Tensor]) -> None:
        self.order, self.done = tensors.pop("order").tolist(), int(tensors.pop("done"))
        self.generator.set_state(tensors.pop("generator"))
        for key, value in tensors.items():
            name, _, number = key.partition("/")
            factor = self.factors[int(number)]
            if name == "factor":
                factor.copy_(value)
            else:  # AdamW counts steps on the CPU
                self.optimizer.state[factor][name] = value if name == "step" else value.to(factor)


class _Divergence:
    """The divergence of two models on a batch."""

    def __init__(self, model: nn.Module, teacher: nn.Module):
        self.model, self.teacher = model, teacher
        self.arguments = set(arguments_of(model)) & set(arguments_of(teacher))

    def __call__(
        self, batch: Mapping[str, Any], compute: str, generator: torch.Generator
    ) -> Tensor:
        """Mean KL in nats, over the batch's positions, or some of them where it has many."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        has_decoder = "decoder_input_ids" in inputs
        mask = inputs.get("decoder_attention_mask" if has_decoder else "attention_mask")
        ids = inputs.get("input_ids")
        if "use_cache" in self.arguments:
            inputs["use_cache"] = False
        if "logits_to_keep" in self.arguments and isinstance(ids, Tensor) and not has_decoder:
            count = ids.shape[-1]
            if count > _POSITIONS:
                chosen = torch.randperm(count, generator=generator)[:_POSITIONS].sort().values
                inputs["logits_to_keep"] = chosen = chosen.to(ids.device)
                mask = mask[:, chosen] if isinstance(mask, Tensor) and mask.ndim == 2 else mask
        h = _logits(self.model, inputs, compute)
        with torch.no_grad():
            g = _logits(self.teacher, inputs, compute)
        if g.shape != h.shape:
            raise CalibrationError(
                f"the float model's logits are {list(g.shape)}, the quantized one's "
                f"{list(h.shape)}: give two versions of the same model"
            )
        divergence = F.kl_div(
            h.float().log_softmax(-1), g.float().log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        if not isinstance(mask, Tensor) or mask.shape != divergence.shape:
            return divergence.mean()
        real = mask.to(divergence)
        return (divergence * real).sum() / real.sum().clamp(min=1)

    @torch.no_grad()
    def mean(self, batches: Sequence[Mapping[str, Any]]) -> float:
        """Over several batches, in float32 and always at the same positions."""
        means = [self(batch, "float32", torch.Generator().manual_seed(0)) for batch in batches]
        return float(torch.stack(means).mean())


def _logits(model: nn.Module, inputs: Mapping[str, Any], compute: str) -> Tensor:
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=compute == "bfloat16"):
        logits = getattr(model(**inputs), "logits", None)
    if not isinstance(logits, Tensor):
        raise CalibrationError(
            f"tuning scales compares logits, but {type(model).__name__} returns none; remove tuning"
        )
    return logits
