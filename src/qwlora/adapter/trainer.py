"""The Trainer of transformers, extended for an adapter on a frozen base; and its checkpoints.

    loss = the model's own loss [+ distance to the float model, when training for recovery]

A loss or gradient that is not finite stops the run before the optimizer step. Checkpoints are plain
PEFT adapters with digests of all their files. `train.py` says why it is this Trainer;
`training_step.py` lists what is replaced inside the model.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from qwlora.adapter.adapter_files import WEIGHTS
from qwlora.adapter.adapter_folder import write_adapter
from qwlora.adapter.training_step import RecoveryLoss
from qwlora.data.sequences import IGNORED
from qwlora.errors import TrainingError, reading
from qwlora.formats import manifest
from qwlora.graph.call_arguments import check_token_ids
from qwlora.system.atomic import files_in
from qwlora.system.parameter_names import canonical_name
from qwlora.system.progress import Track


class AdapterTrainer(Trainer):
    """Checks losses and gradients before the optimizer step; saves plain adapters."""

    recovery: RecoveryLoss | None = None  # added to the model's own loss
    uses_graph: bool = False  # a graph replaces the model's forward, so its layers do not run

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.data_collator, self._collate = self._checked_batch, self.data_collator
        self.remove_callback(PrinterCallback)
        # The Trainer looks this up by the name of the model's loss, which not every model has.
        # Without the shift, labels of first tokens count, which nothing predicts.
        self._loss_shifts_labels = True

    @property
    def adapted(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _checked_batch(self, items: list[Any]) -> dict[str, Any]:
        # The batch is still on the CPU, where checks do not wait for a device.
        batch: dict[str, Any] = self._collate(items)
        check_token_ids(batch, self.adapted, TrainingError)
        labels = batch.get("labels")
        if (
            isinstance(labels, Tensor)
            # Other batches of an accumulated step may have loss tokens.
            and self.args.gradient_accumulation_steps == 1
            and not bool((labels[:, 1:] != IGNORED).any())
        ):
            raise TrainingError(
                f"a batch of {len(labels)} sequences has no loss token: they have fewer than two "
                "tokens, or all labels are -100. Remove such sequences from the training data"
            )
        return batch

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.recovery is None:
            return loss
        distance = self.recovery.distance(inputs)
        # The model's own loss is divided by the tokens of all accumulated batches. The Trainer
        # divides only losses of models that do not take that number.
        if model.training and self.model_accepts_loss_kwargs:
            distance = distance / self.current_gradient_accumulation_steps
        return (loss[0] + distance, *loss[1:]) if isinstance(loss, tuple) else loss + distance

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        named = [(n, p.grad) for n, p in self.adapted.named_parameters() if p.grad is not None]
        checked = [loss, *(gradient for _, gradient in named)]
        # One wait for a device, whatever the number of gradients.
        finite = torch.stack([tensor.isfinite().all() for tensor in checked]).tolist()
        if not finite[0]:
            where = "" if self.uses_graph else self._first_bad_output(inputs)
            self._stop(f"the loss is {float(loss)}", where)
        # Backward runs from the top of the model, so the last bad name is where it began.
        if not all(finite):
            bad = [name for (name, _), good in zip(named, finite[1:], strict=True) if not good]
            where = f"; the first, from the top of the model, is in {canonical_name(bad[-1])}"
            self._stop("a gradient is not finite", where)
        return loss

    @torch.no_grad()
    def _first_bad_output(self, inputs: dict[str, Any]) -> str:
        """The first output that is not finite, in words; runs the model again."""
        bad: list[str] = []

        def check(name: str, module: nn.Module, args: Any, output: Any) -> None:
            leaves = (t for t in tree_leaves(output) if isinstance(t, Tensor))
            if not all(bool(t.isfinite().all()) for t in leaves if t.is_floating_point()):
                bad.append(canonical_name(name) or "the model itself")

        with contextlib.ExitStack() as stack:
            for name, module in self.adapted.named_modules():
                hook = functools.partial(check, name)
                stack.callback(module.register_forward_hook(hook).remove)
            stack.enter_context(self.compute_loss_context_manager())
            self.adapted(**self._prepare_inputs(inputs))
        if not bad:
            return "; the outputs of all layers are finite"
        return f"; the first output that is not finite is that of {bad[0]}"

    def _stop(self, problem: str, where: str) -> None:
        raise TrainingError(
            f"{problem} at step {self.state.global_step + 1}{where}; "
            f"{last_good(Path(str(self.args.output_dir)))}. "
            f"Lower the learning rate (now {self.args.learning_rate:g}), raise warmup_steps, or "
            "check the training data"
        )

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            write_adapter(self.adapted, folder, state_dict)


FEW, MANY = 5, 50
Watch = Callable[[Callable[[], dict[str, Any]]], None]
"""Called after each step with a function that returns `step`, `steps`, `losses`, `evaluations`,
`step_seconds`, and, if training diverged, the `limit` of the loss."""


def divergence(losses: Sequence[float], vocabulary: int) -> tuple[float, int] | None:
    """Whether the loss has diverged: each of the last 5 losses, or the mean of the last w, is above

        max( 2 m, m + 1, m + 3 sqrt(2 log N) s / sqrt(n) )      in nats

        N   steps before them
        w   a quarter of all steps, at least 5 and at most 50
        n   5 or w, the number of losses compared
        m   lowest mean of w consecutive losses before them
        s   standard deviation of one loss, from differences of consecutive losses (no trend)

    It has also diverged if each of the last 5 losses is above both the loss of a uniform guess and
    the first loss, by 1 nat:

        max( first + 1, log V + 1 )                             V entries in the vocabulary

    Returns (limit, n), or None: the last n losses, or their mean if n is not FEW, are above limit.
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
            # The last term is for mixed data in random order, such as code and prose, where low
            # means occur by chance: two thirds of it is the expected range of N such means.
            limits = [max(2 * m, m + 1, m + 3 * math.sqrt(2 * math.log(len(before)) / n) * s)]
        if n == FEW and len(losses) > FEW:
            limits.append(max(losses[0] + 1, math.log(vocabulary) + 1))
        if (min(last) if n == FEW else statistics.fmean(last)) > min(limits):
            return min(limits), n
    return None


class TrainingMonitor(TrainerCallback):
    """Times the steps, reports progress, and stops at divergence (unless `vocabulary` is None).
    Ctrl-C, SIGTERM and SIGHUP finish the current step, write a checkpoint and stop."""

    def __init__(self, track: Track, checkpoint_steps: int, vocabulary: int | None, watch: Watch):
        self.track, self.checkpoint_steps = track, checkpoint_steps
        self.vocabulary, self.watch = vocabulary, watch
        self.step_seconds: list[float] = []
        self.interrupted: int | None = None  # the signal that asked to stop
        self._began = 0.0
        self._bar: Iterator[int] = iter(())

    @property
    def mean_step_seconds(self) -> float:
        # The first step includes warming up.
        timed = self.step_seconds[1:] or self.step_seconds or [0.0]
        return sum(timed) / len(timed)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
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
        # Digests come after all files, each process's own (its random state) included. A folder
        # without them was interrupted, and one whose files differ is damaged.
        PartialState().wait_for_everyone()
        if args.should_save:
            checkpoint = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
            manifest.write(checkpoint, DIGESTS, {}, files_in(checkpoint))

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
                "evaluations": evaluations_of(state),
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


def evaluations_of(state: TrainerState) -> list[list[float]]:
    """[step, loss] of each evaluation on held-out text."""
    return [[int(e["step"]), float(e["eval_loss"])] for e in state.log_history if "eval_loss" in e]


def losses_of(state: TrainerState) -> list[float]:
    """The loss of every step so far, including those before an interruption."""
    return [float(entry["loss"]) for entry in state.log_history if "loss" in entry]


STATE = "trainer_state.json"
DIGESTS = "digests.json"


def last_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint, if that of its best evaluation is complete too, or None."""

    # Nothing is deleted here, because several processes must find the same.
    def is_complete(checkpoint: Path) -> bool:
        return manifest.has_digests(checkpoint, DIGESTS) and not manifest.changed_files(
            checkpoint, DIGESTS
        )

    newest_first = sorted(work.glob("checkpoint-*"), key=step_of, reverse=True)
    return next((c for c in newest_first if is_complete(c) and is_complete(_best(c) or c)), None)


def delete_newer(work: Path, last: Path | None) -> None:
    """Delete the checkpoints newer than `last`, which are incomplete or damaged."""
    for checkpoint in work.glob("checkpoint-*"):
        if last is None or step_of(checkpoint) > step_of(last):
            shutil.rmtree(checkpoint)


def final_checkpoint(last: Path, steps: int, patience: int | None, keeps_best: bool) -> Path | None:
    """The checkpoint with the final adapter (with `keeps_best`, that of the best evaluation) if
    training had ended at `last`: after all steps, or `patience` evaluations without improvement."""
    stopped_early = patience and evaluations_without_improvement(last) >= patience
    if read_state(last).global_step < steps and not stopped_early:
        return None
    chosen = (_best(last) if keeps_best else None) or last
    return chosen if (chosen / WEIGHTS).exists() else None


def evaluations_without_improvement(checkpoint: Path) -> int:
    """Number of evaluations in a row without improvement, up to `checkpoint`."""
    # transformers stores a list of callbacks and reads a mapping.
    callbacks: Any = read_state(checkpoint).stateful_callbacks
    stopping = callbacks.get("EarlyStoppingCallback")
    attributes = stopping["attributes"] if isinstance(stopping, dict) else {}
    return int(attributes.get("early_stopping_patience_counter", 0))


def last_good(work: Path) -> str:
    """Where the newest complete checkpoint is, in words for an error message."""
    if complete := [c for c in work.glob("checkpoint-*") if (c / DIGESTS).exists()]:
        return f"the last good checkpoint is {max(complete, key=step_of)}"
    return "no checkpoint has been written"


def read_state(checkpoint: Path) -> TrainerState:
    """The Trainer's state at `checkpoint`."""
    with reading(checkpoint / STATE):
        return TrainerState.load_from_json(str(checkpoint / STATE))


def step_of(checkpoint: Path) -> int:
    """The training step after which `checkpoint` was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _best(checkpoint: Path) -> Path | None:
    step = read_state(checkpoint).best_global_step
    return checkpoint.with_name(f"checkpoint-{step}") if step else None
