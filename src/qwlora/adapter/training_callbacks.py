"""What is watched while an adapter trains: time, losses, interruption, and whether the numbers still mean anything.

The loss has diverged when the last 5 steps all lie above, or the mean of the last w lies above,

    max( 2 m, m + 1, m + 3 sqrt(2 log N) s / sqrt(n) )      in nats,    n = 5 or w,    w = a quarter of the N steps, 5 at least and 50 at most

where m is the lowest mean of w consecutive losses before them, and s the standard deviation of a loss, from the differences of those that follow one another
(so that learning does not count). The last term is for data of several kinds in random order, as code and prose: two thirds of it lie between the lowest and
the highest of N such means. Or when the last 5 steps all lie above what knowing nothing costs, and above the first:

    max( first + 1, log V + 1 )                V entries in the vocabulary

A loss or gradient that is not finite stops at once, before the step is taken, and the first layer whose output (or the first adapter weight, from the top,
whose gradient) is not finite is named.
"""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwlora.adapter.fsdp import base_bytes
from qwlora.errors import TrainingError
from qwlora.parameter_names import canonical_name
from qwlora.progress import Track

FEW, MANY = 5, 50


@dataclass(frozen=True)
class Divergence:
    """The last `steps` losses lie above `limit`: each of them if they are FEW, else their mean."""

    limit: float
    steps: int


def divergence(losses: Sequence[float], vocabulary: int) -> Divergence | None:
    """Whether `losses`, of all steps so far, have diverged by the rule above."""
    window = min(MANY, max(FEW, len(losses) // 4))
    for steps in sorted({FEW, window}):
        last = losses[-steps:]
        above = min(last) if steps == FEW else statistics.fmean(last)
        limits = [_lost(losses[:-steps], window, steps)]
        if steps == FEW and len(losses) > FEW:
            limits.append(max(losses[0] + 1, math.log(vocabulary) + 1))
        if above > min(limits):
            return Divergence(min(limits), steps)
    return None


def _lost(before: Sequence[float], window: int, steps: int) -> float:
    """From where on what was learnt is gone."""
    if len(before) < window:
        return math.inf
    values = torch.tensor(before, dtype=torch.float64)
    sums = torch.nn.functional.pad(values.cumsum(0), (1, 0))
    lowest = float((sums[window:] - sums[:-window]).min()) / window
    spread = float(values.diff().square().mean() / 2) ** 0.5
    return max(
        2 * lowest, lowest + 1, lowest + 3 * math.sqrt(2 * math.log(len(before)) / steps) * spread
    )


class Watch(TrainerCallback):
    """Times the steps, keeps the losses, reports progress, and turns Ctrl-C, SIGTERM and SIGHUP into "finish this step, write a checkpoint, stop".

    Args:
        checkpoint_steps: a checkpoint is written after every so many steps, besides those that follow an evaluation.
        vocabulary: its entries; None lets a loss that has diverged go on.
        last_good: says where the newest whole checkpoint is, for the message of an error.
    """

    def __init__(
        self,
        track: Track,
        checkpoint_steps: int,
        vocabulary: int | None,
        last_good: Callable[[], str],
    ):
        self.track, self.checkpoint_steps, self.vocabulary, self.last_good = (
            track,
            checkpoint_steps,
            vocabulary,
            last_good,
        )
        self.step_seconds: list[float] = []
        self.interrupted: int | None = None  # the signal that asked to stop
        self.base_bytes = 0
        self._began = 0.0
        self._bar: Iterator[int] = iter(())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        self.base_bytes = base_bytes(given["model"])
        self._bar = self.track(
            range(state.global_step, args.max_steps), "training", args.max_steps - state.global_step
        )
        next(self._bar, None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        next(self._bar, None)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.step_seconds.append(time.perf_counter() - self._began)
        next(self._bar, None)
        if state.global_step % self.checkpoint_steps == 0:
            control.should_save = True
        if self.interrupted is not None:
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.vocabulary is None or "loss" not in (logs or {}):
            return
        losses = losses_of(state)
        if (found := divergence(losses, self.vocabulary)) is not None:
            raise TrainingError(
                f"training diverged: the loss is {losses[-1]:.3f} at step {state.global_step}, and has been above {found.limit:.3f} for {found.steps} steps"
                f"{'' if found.steps == FEW else ' in the mean'} (lowest before: {min(losses[: -found.steps]):.3f}); {self.last_good()}. "
                f"Lower the learning rate (now {args.learning_rate:g}) or raise warmup_steps; divergence: ignore goes on all the same"
            )

    def interrupt(self, number: int) -> None:
        """Stop after this step, because of signal `number`; a second Ctrl-C stops at once."""
        if self.interrupted is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.interrupted is None:
            self.interrupted = number


def losses_of(state: TrainerState) -> list[float]:
    """The loss of every step so far, those before an interruption among them."""
    return [float(entry["loss"]) for entry in state.log_history if "loss" in entry]


def first_output_not_finite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Name of the module whose output is the first that holds a nan or an infinity, while `forward` runs; None if there is none."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = (
                output
                if isinstance(output, tuple | list)
                else output.values()
                if isinstance(output, dict)
                else (output,)
            )
            if not found and any(
                isinstance(t, Tensor) and t.is_floating_point() and not bool(t.isfinite().all())
                for t in tensors
            ):
                found.append(canonical_name(name) or "the model itself")

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_gradient_not_finite(model: nn.Module) -> str | None:
    """Name of the trainable parameter, from the model's top downwards, whose gradient is the first that holds a nan or an infinity."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if not gradients or bool(torch.stack([g.isfinite().all() for g in gradients.values()]).all()):
        return None
    return next(
        canonical_name(name)
        for name in reversed(gradients)
        if not bool(gradients[name].isfinite().all())
    )
