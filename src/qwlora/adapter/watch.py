"""What is watched while an adapter trains: time, losses, interruption, and whether the numbers still mean anything.

A loss has diverged when five steps in a row lie above

    min( max(2 m, m + 1),  max(first + 1, log V + 1) )      in nats

where m is the lowest mean of five consecutive losses before them, and log V what knowing nothing costs (V entries in the vocabulary). The first says that what
was learnt is gone, the second that the model does worse than chance and than it began. A loss or gradient that is not finite stops at once, before the step is
taken, and the first layer whose output (or the first adapter weight, from the top, whose gradient) is not finite is named.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwlora.adapter.shard import base_bytes
from qwlora.errors import TrainingError
from qwlora.grid.names import canonical_name
from qwlora.progress import Track

WINDOW = 5


def divergence_limit(losses: Sequence[float], vocabulary: int) -> float | None:
    """The limit that the last `WINDOW` of `losses` have all passed, or None."""
    if len(losses) <= WINDOW:
        return None
    before, last = losses[:-WINDOW], losses[-WINDOW:]
    limit = max(before[0] + 1, math.log(vocabulary) + 1)
    if len(before) >= WINDOW:
        lowest = min(statistics.fmean(before[i : i + WINDOW]) for i in range(len(before) - WINDOW + 1))
        limit = min(limit, max(2 * lowest, lowest + 1))
    return limit if min(last) > limit else None


class Watch(TrainerCallback):
    """Times the steps, keeps the losses, reports progress, and turns Ctrl-C into "finish this step, write a checkpoint, stop".

    Args:
        checkpoint_steps: a checkpoint is written after every so many steps, besides those that follow an evaluation.
        last_good: says where the newest whole checkpoint is, for the message of an error.
    """

    def __init__(self, track: Track, checkpoint_steps: int, vocabulary: int, last_good: Callable[[], str]):
        self.track, self.checkpoint_steps, self.vocabulary, self.last_good = track, checkpoint_steps, vocabulary, last_good
        self.step_seconds: list[float] = []
        self.interrupted = False
        self.base_bytes = 0
        self._began = 0.0
        self._bar: Iterator[int] = iter(())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.base_bytes = base_bytes(given["model"])
        self._bar = self.track(range(state.global_step, args.max_steps), "training", args.max_steps - state.global_step)
        next(self._bar, None)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        next(self._bar, None)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self._began)
        next(self._bar, None)
        if state.global_step % self.checkpoint_steps == 0:
            control.should_save = True
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **_: Any) -> None:
        if "loss" not in (logs or {}):
            return
        losses = losses_of(state)
        if (limit := divergence_limit(losses, self.vocabulary)) is not None:
            raise TrainingError(
                f"training diverged: the loss is {losses[-1]:.3f} at step {state.global_step}, and has been above {limit:.3f} for {WINDOW} steps "
                f"(lowest before: {min(losses[:-WINDOW]):.3f}); {self.last_good()}. Lower the learning rate (now {args.learning_rate:g}) or raise warmup_steps"
            )

    def interrupt(self, *_: Any) -> None:
        """Signal handler; a second signal is not waited for."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True


def losses_of(state: TrainerState) -> list[float]:
    """The loss of every step so far, those before an interruption among them."""
    return [float(entry["loss"]) for entry in state.log_history if "loss" in entry]


def first_output_not_finite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Name of the module whose output is the first that holds a nan or an infinity, while `forward` runs; None if there is none."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple | list) else output.values() if isinstance(output, dict) else (output,)
            if not found and any(isinstance(t, Tensor) and t.is_floating_point() and not bool(t.isfinite().all()) for t in tensors):
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
    return next(canonical_name(name) for name in reversed(gradients) if not bool(gradients[name].isfinite().all()))
