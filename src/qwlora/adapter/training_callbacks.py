"""Monitoring of a training run: timing, progress, stop signals and divergence.

The loss has diverged if each of the last 5 losses, or the mean of the last w, is above

    max( 2 m, m + 1, m + 3 sqrt(2 log N) s / sqrt(n) )      in nats

    N   steps before them
    w   a quarter of all steps, at least 5 and at most 50
    n   5 or w, the number of losses compared
    m   lowest mean of w consecutive losses before them
    s   standard deviation of one loss, from differences of consecutive losses (without the trend)

The last term is for mixed data in random order, such as code and prose, where low means occur by
chance: two thirds of it is the expected range of N such means.

The loss has also diverged if each of the last 5 losses is above both the loss of a uniform guess
and the first loss, by 1 nat:

    max( first + 1, log V + 1 )                             V entries in the vocabulary
"""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwlora.adapter.fsdp import base_bytes
from qwlora.adapter.training_checkpoints import last_good, seal
from qwlora.errors import TrainingError
from qwlora.system.progress import Track

FEW, MANY = 5, 50
Watch = Callable[[Callable[[], dict[str, Any]]], None]
"""Called after each step with a function that returns `step`, `steps`, `losses`, `evaluations`,
`step_seconds`, and, if training diverged, the `limit` of the loss."""


def divergence(losses: Sequence[float], vocabulary: int) -> tuple[float, int] | None:
    """Apply the rule above to the losses of all steps so far.

    Returns:
        None if they have not diverged, else (limit, n): the last n losses are above the limit, each
        if n is FEW, else their mean.
    """
    window = min(MANY, max(FEW, len(losses) // 4))
    for n in sorted({FEW, window}):
        last, before = losses[-n:], losses[:-n]
        limits = [math.inf]
        if len(before) >= window:
            values = torch.tensor(before, dtype=torch.float64)
            sums = torch.nn.functional.pad(values.cumsum(0), (1, 0))
            m = float((sums[window:] - sums[:-window]).min()) / window
            s = float(values.diff().square().mean() / 2) ** 0.5
            limits = [max(2 * m, m + 1, m + 3 * math.sqrt(2 * math.log(len(before)) / n) * s)]
        if n == FEW and len(losses) > FEW:
            limits.append(max(losses[0] + 1, math.log(vocabulary) + 1))
        if (min(last) if n == FEW else statistics.fmean(last)) > min(limits):
            return min(limits), n
    return None


class TrainingMonitor(TrainerCallback):
    """Times the steps, reports progress, stops at divergence, and turns signals into a clean stop.

    Ctrl-C, SIGTERM and SIGHUP finish the current step, write a checkpoint and stop.

    Args:
        checkpoint_steps: steps between checkpoints, in addition to those after an evaluation.
        vocabulary: number of entries; None disables the divergence check.
    """

    def __init__(self, track: Track, checkpoint_steps: int, vocabulary: int | None, watch: Watch):
        self.track, self.checkpoint_steps = track, checkpoint_steps
        self.vocabulary, self.watch = vocabulary, watch
        self.step_seconds: list[float] = []
        self.interrupted: int | None = None  # the signal that asked to stop
        self.base_bytes = 0
        self._began = 0.0
        self._bar: Iterator[int] = iter(())

    @property
    def mean_step_seconds(self) -> float:
        """Without the first step, which includes warming up."""
        timed = self.step_seconds[1:] or self.step_seconds or [0.0]
        return sum(timed) / len(timed)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        self.base_bytes = base_bytes(given["model"])
        steps = range(state.global_step, args.max_steps)
        self._bar = self.track(steps, "training", len(steps))
        next(self._bar, None)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        next(self._bar, None)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
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

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes files of its own
        if args.should_save:
            seal(Path(str(args.output_dir), f"checkpoint-{state.global_step}"))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if "loss" not in given["logs"]:
            return
        losses = losses_of(state)

        def progress() -> dict[str, Any]:
            return {
                "step": state.global_step,
                "steps": args.max_steps,
                "losses": losses,
                "evaluations": [list(e) for e in evaluations_of(state)],
                "step_seconds": self.mean_step_seconds,
            }

        self.watch(progress)
        if self.vocabulary is None or (diverged := divergence(losses, self.vocabulary)) is None:
            return
        limit, steps = diverged
        self.watch(lambda: {**progress(), "limit": limit})
        mean = "" if steps == FEW else "in the mean "
        raise TrainingError(
            f"training diverged: the loss is {losses[-1]:.3f} at step {state.global_step}, and "
            f"{mean}above {limit:.3f} for {steps} steps (lowest before: "
            f"{min(losses[:-steps]):.3f}); {last_good(Path(str(args.output_dir)))}. Lower "
            f"the learning rate (now {args.learning_rate:g}) or raise warmup_steps. To continue "
            "anyway, set divergence: ignore"
        )

    def interrupt(self, number: int) -> None:
        """Stop after this step because of signal `number`; a second Ctrl-C stops at once."""
        if self.interrupted is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.interrupted is None:
            self.interrupted = number


def evaluations_of(state: TrainerState) -> tuple[tuple[int, float], ...]:
    """(step, loss) of each evaluation on held-out text."""
    return tuple(
        (int(e["step"]), float(e["eval_loss"])) for e in state.log_history if "eval_loss" in e
    )


def losses_of(state: TrainerState) -> list[float]:
    """The loss of every step so far, including those before an interruption."""
    return [float(entry["loss"]) for entry in state.log_history if "loss" in entry]
