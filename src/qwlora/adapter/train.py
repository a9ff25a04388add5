"""Train the adapter of a frozen base with `transformers.Trainer`.

TRL's SFTTrainer would add tokenizing, packing and masking, which our data stage does before.
Its memory-saving losses work for the models it knows; ours works for any causal model
(`chunked_loss.py`).

Only the adapter receives gradients; this is checked before the first step. The caller knows the
fingerprint of the base and checks that the base is unchanged (`pipeline`).

A killed run resumes from its last checkpoint (adapter, optimizer, schedule, random state, data
order) and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    get_reporting_integration_callbacks,
)

from qwlora.adapter.adapter_files import WEIGHTS
from qwlora.adapter.adapter_folder import reading
from qwlora.adapter.attach import check_trainable
from qwlora.adapter.chunked_loss import causal_model
from qwlora.adapter.trainer import (
    AdapterTrainer,
    TrainingMonitor,
    Watch,
    delete_newer,
    evaluations_of,
    evaluations_without_improvement,
    final_checkpoint,
    last_checkpoint,
    losses_of,
    read_state,
    step_of,
)
from qwlora.adapter.training_step import RecoveryLoss, lean_steps, replaced_forward
from qwlora.data.sequences import as_sequences
from qwlora.errors import MissingExtraError, TrainingError
from qwlora.graph.call_arguments import vocabulary_size
from qwlora.nn.frozen import assert_frozen
from qwlora.nn.packed_layer import packed_layers
from qwlora.system.device import device_of
from qwlora.system.machine import process_count
from qwlora.system.progress import Track, untracked
from qwlora.system.stop_signals import Stopped, on_stop_signal

# transformers before 5.23 has only the old name.
_CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(TrainingArguments, "activation_checkpointing")
    else "gradient_checkpointing"
)


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of one training run; the recipe reference documents each field."""

    steps: int
    learning_rate: float
    batch_sequences: int
    warmup_steps: int
    schedule: str
    checkpoint_steps: int
    seed: int
    accumulation_steps: int = 1
    clip: float = 1.0
    weight_decay: float = 0.0
    compute: str = "float32"
    gradient_checkpointing: bool = False
    evaluation_steps: int | None = None
    patience: int | None = None
    divergence: str = "stop"
    report_to: Sequence[str] = ()


@dataclass(frozen=True)
class TrainingReport:
    """Results of a training run, including the steps before an interruption."""

    steps: int
    step_seconds: float  # mean since the run started or resumed, without the first step
    resumed_from_step: int
    trainable_parameters: int
    losses: list[float]
    evaluations: list[list[float]] = field(default_factory=list)  # [step, loss] on held-out text
    best_step: int | None = None


class Interrupted(Stopped):
    """Signal `number` stopped training; a checkpoint was written at `step`."""

    def __init__(self, step: int, number: int):
        self.step = step
        super().__init__(number, f"stopped after step {step}")


TrainingData = Dataset[dict[str, Tensor]] | Tensor
"""Items with `input_ids`, `labels` (-100 for tokens outside the loss) and any other input of the
model's forward; or token ids [count, tokens]."""


def train_adapter(
    model: PeftModel,
    sequences: TrainingData,
    settings: TrainingSettings,
    work: Path,
    held_out: TrainingData | None = None,
    teacher: PreTrainedModel | None = None,
    training_graph: nn.Module | None = None,
    *,
    track: Track = untracked,
    logs: Path | None = None,
    watch: Watch = lambda progress: None,
) -> TrainingReport:
    """Train the active adapter of `model`, in place and on its device.

    Checkpoints are written to `work`. If there is one already, training resumes from the last.

    Args:
        held_out: evaluated every `evaluation_steps`; the adapter of the best evaluation is kept.
        teacher: the float model, to train for recovery (`RecoveryLoss`).
        training_graph: replaces the model's forward during training (`replaced_forward`).
        logs: folder for TensorBoard files.

    Raises:
        TrainingError: see `check_trainable` and `replaced_forward`; FSDP is on; the batch cannot be
            divided among the processes; or the loss is not finite or has diverged.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; `work` has a checkpoint of the last finished step.
    """
    trainable = check_trainable(model)
    if packed_layers(model):  # LoRA on floats is trained for comparisons
        assert_frozen(model)
    texts: list[Any] = [
        as_sequences(text) if isinstance(text, Tensor) else text for text in (sequences, held_out)
    ]
    training, evaluation = texts
    for kind, text in (("training text", training), ("held-out text", evaluation)):
        if isinstance(text, Sized) and not len(text):
            raise TrainingError(f"the {kind} has no sequence. Use more text, or shorter sequences")
    keeps_best = settings.evaluation_steps is not None
    if keeps_best and held_out is None:
        raise TrainingError("evaluation_steps needs held-out text, but there is no held-out text")
    last = last_checkpoint(work)
    arguments = _arguments(settings, work, process_count(), device_of(model))
    vocabulary = vocabulary_size(causal_model(model)) if settings.divergence == "stop" else None
    monitor = TrainingMonitor(track, settings.checkpoint_steps, vocabulary, watch)

    def report(state: TrainerState) -> TrainingReport:
        return TrainingReport(
            steps=state.global_step,
            step_seconds=monitor.mean_step_seconds,
            resumed_from_step=step_of(last) if last else 0,
            trainable_parameters=trainable,
            losses=losses_of(state),
            evaluations=evaluations_of(state),
            best_step=state.best_global_step if keeps_best else None,
        )

    # If training had ended, but the adapter was not saved, the Trainer would train one step more.
    if last and (final := final_checkpoint(last, settings.steps, settings.patience, keeps_best)):
        with reading(final, model):
            set_peft_model_state_dict(model, load_file(final / WEIGHTS))
        return report(read_state(last))
    with replaced_forward(model, training_graph, process_count()):
        trainer = AdapterTrainer(
            model, arguments, train_dataset=training, eval_dataset=evaluation, callbacks=[monitor]
        )
        if settings.patience:
            # The Trainer could restore its count, but would recreate every callback and restore
            # control flags too.
            stopping = EarlyStoppingCallback(settings.patience)
            if last:
                stopping.early_stopping_patience_counter = evaluations_without_improvement(last)
            trainer.add_callback(stopping)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and logs is not None:
                callback.logging_dir = str(logs)
        # Every process looks for `last` by itself, so none may be gone before all have found it.
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            delete_newer(work, last)
        if teacher is not None:
            teacher.to(arguments.device)  # type: ignore[arg-type] # hidden by transformers
        if training_graph is not None:
            training_graph.to(trainer.args.device)
            trainer.uses_graph = True
        with contextlib.ExitStack() as stack:
            stack.enter_context(on_stop_signal(monitor.interrupt))
            if teacher is not None:
                trainer.recovery = stack.enter_context(RecoveryLoss(model, teacher))
            stack.enter_context(lean_steps(model, trainer.args.bf16))
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        if monitor.interrupted is not None:
            raise Interrupted(trainer.state.global_step, monitor.interrupted)
    return report(trainer.state)


def check_loggers(report_to: Sequence[str]) -> None:
    """Check that the Trainer knows every logger and that its package is installed."""
    for name in report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise MissingExtraError(f"report_to {name!r}: {error}") from error


def _arguments(
    settings: TrainingSettings, work: Path, processes: int, device: torch.device
) -> TrainingArguments:
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise TrainingError("Training with FSDP is not supported. Launch without FSDP")
    if settings.batch_sequences % processes:
        raise TrainingError(
            f"batch_sequences ({settings.batch_sequences}) cannot be divided among {processes} "
            "processes. Use a multiple"
        )
    evaluates = settings.evaluation_steps is not None
    # Reentrant checkpointing cuts the gradient where no input needs one, as in a frozen base.
    checkpointing: dict[str, Any] = {
        _CHECKPOINTING: settings.gradient_checkpointing,
        f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False},
    }
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        per_device_train_batch_size=settings.batch_sequences // processes,
        per_device_eval_batch_size=settings.batch_sequences // processes,
        gradient_accumulation_steps=settings.accumulation_steps,
        bf16=settings.compute == "bfloat16",
        **checkpointing,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.evaluation_steps,
        prediction_loss_only=True,
        load_best_model_at_end=evaluates,
        metric_for_best_model="loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        save_strategy="steps",
        save_steps=settings.evaluation_steps or settings.checkpoint_steps,
        save_total_limit=1,
        logging_steps=1,
        # The filter would put the mean of earlier losses for a nan; AdapterTrainer stops at it.
        logging_nan_inf_filter=False,
        seed=settings.seed,
        report_to=list(settings.report_to),
        label_names=["labels"],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False if processes > 1 else None,
        # Buffers are the packed base, which never changes.
        ddp_broadcast_buffers=False if processes > 1 else None,
    )
    # One device per process. With more, the Trainer would copy the model to each (DataParallel),
    # and a copy does not have the replaced forward.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    # On the model's device. The Trainer and accelerate would take the first of the machine.
    if processes == 1 and device.type != "cpu":
        vars(arguments)["_setup_devices"] = PartialState().device = device
    return arguments
