"""Train one adapter on a frozen base with `transformers.Trainer`.

What must hold and is checked: only lora_A and lora_B receive gradients (by name, before the first step), and the loss stays a number. That the base is
untouched is checked by whoever holds its fingerprint (see `pipeline`).
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwlora.errors import TrainingError
from qwlora.progress import Track, untracked


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast; the recipe documents each field."""

    steps: int
    learning_rate: float
    batch_sequences: int
    warmup_steps: int
    schedule: str
    checkpoint_steps: int
    seed: int


@dataclass(frozen=True)
class TrainingReport:
    """What a training run says of itself."""

    steps: int
    step_seconds: float
    resumed_from_step: int
    trainable_parameters: int
    losses: tuple[float, ...]


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has written a checkpoint at `step`."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"stopped after step {step}")


def attach(model: PreTrainedModel, rank: int, alpha: float, dropout: float, target_modules: str | list[str], seed: int) -> PeftModel:
    """A fresh LoRA adapter on `model`, seeded.

    Raises:
        TrainingError: no layer matches `target_modules`.
    """
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise TrainingError(f"LoRA cannot be attached to target_modules {target_modules!r}: {error}") from error


def check_trainable(model: torch.nn.Module) -> int:
    """Number of trainable parameters, all of them in lora_A or lora_B.

    Raises:
        TrainingError: something else would be trained, or nothing would.
    """
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    strangers = [name for name in trainable if not any(part in ("lora_A", "lora_B") for part in name.split("."))]
    if strangers:
        raise TrainingError(f"training would move {', '.join(strangers[:3])}; only lora_A and lora_B may be trained on a frozen base")
    if not trainable:
        raise TrainingError("the model has no trainable parameter: attach a LoRA adapter first")
    return sum(trainable.values())


class _Sequences(Dataset[dict[str, Tensor]]):
    def __init__(self, ids: Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class _Watch(TrainerCallback):
    """Times the steps, keeps the losses, reports progress, and turns Ctrl-C into "finish this step, write a checkpoint, stop"."""

    def __init__(self, track: Track):
        self.track = track
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.interrupted = False
        self._began = 0.0
        self._bar: Iterator[int] = iter(())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar = self.track(range(state.global_step, args.max_steps), "training", args.max_steps - state.global_step)
        next(self._bar, None)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        next(self._bar, None)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self._began)
        next(self._bar, None)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self.losses.append(loss)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {state.global_step}; lower the learning rate (now {args.learning_rate:g}) or raise warmup_steps")

    def interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True


def train_adapter(
    model: PeftModel,
    ids: Int64[Tensor, "count tokens"],
    settings: TrainingSettings,
    work: Path,
    track: Track = untracked,
) -> TrainingReport:
    """Train the active adapter of `model` on `ids`; checkpoints go to `work`, and the last one there is where it goes on from.

    Raises:
        TrainingError: see `check_trainable`; or the loss became nan or infinite.
        Interrupted: Ctrl-C; a checkpoint of the last finished step is in `work`.
    """
    trainable = check_trainable(model)
    if (last := last_checkpoint(work)) and _step(last) >= settings.steps:  # stopped between the last step and the artifact
        set_peft_model_state_dict(model, load_file(last / "adapter_model.safetensors"))
        return TrainingReport(settings.steps, 0.0, settings.steps, trainable, ())
    watch = _Watch(track)
    trainer = Trainer(model=model, args=_arguments(settings, work), train_dataset=_Sequences(ids), callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    resumed = _step(last) if last else 0
    previous = signal.signal(signal.SIGINT, watch.interrupt) if _in_main_thread() else None
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        if previous is not None:
            signal.signal(signal.SIGINT, previous)
    if watch.interrupted:
        raise Interrupted(trainer.state.global_step)
    timed = watch.step_seconds[1:] or watch.step_seconds or [0.0]
    return TrainingReport(settings.steps, sum(timed) / len(timed), resumed, trainable, tuple(watch.losses))


def last_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that was written to its end; half-written ones are deleted. The Trainer writes `trainer_state.json` last."""
    found = sorted(work.glob("checkpoint-*"), key=_step, reverse=True)
    for checkpoint in found:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
        else:
            return checkpoint
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _arguments(settings: TrainingSettings, work: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        per_device_train_batch_size=settings.batch_sequences,
        save_strategy="steps",
        save_steps=settings.checkpoint_steps,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is nan must be seen
        seed=settings.seed,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
