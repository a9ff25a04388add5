"""Train the adapter of a frozen base with `transformers.Trainer`.

Why the Trainer and not TRL's SFTTrainer: what SFTTrainer adds is tokenizing, packing and masking, which the data step does before anything trains, and losses
that save memory for the models it knows, where ours is for any (`loss.py`). The loop, the schedules, resuming, bf16, several processes and the loggers are
the Trainer's in both.

What must hold and is checked: only the adapter receives gradients (by name, before the first step), and the loss stays a number that has not diverged
(`watch.py`). That the base is untouched is checked by whoever holds its fingerprint (see `pipeline`).

A run that was killed goes on from its last checkpoint (adapter, optimizer, schedule, random numbers, order of the data) and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerState, TrainingArguments

from qwlora.adapter.adapter_folder import WEIGHTS, reading
from qwlora.adapter.attach import check_trainable
from qwlora.adapter.chunked_loss import ChunkedLoss, causal_model, chunk_loss_, vocabulary_size
from qwlora.adapter.fsdp import gather_, prepare_sharding_
from qwlora.adapter.graph_training import RangesCallback, Through, TrainedThrough, load_ranges_
from qwlora.adapter.lean_steps import lean_steps
from qwlora.adapter.recovery_loss import Recovery
from qwlora.adapter.trainer import AdapterTrainer
from qwlora.adapter.training_callbacks import Watch, losses_of
from qwlora.adapter.training_checkpoints import (
    delete_newer,
    final_checkpoint,
    last_checkpoint,
    last_good,
    read_state,
    step_of,
    waited,
)
from qwlora.data.sequences import as_sequences
from qwlora.errors import MissingExtraError, TrainingError
from qwlora.nn.frozen import assert_frozen, packed_layers
from qwlora.progress import Track, untracked
from qwlora.system.stop_signals import Stopped, on_stop_signal


@dataclass(frozen=True)
class TrainingSettings:
    """How long, how fast and in what precision; the recipe documents each field."""

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
    loss: str = "chunked"
    evaluation_steps: int | None = None
    patience: int | None = None
    divergence: str = "stop"
    report_to: tuple[str, ...] = ()
    range_learning_rate: float | None = None


@dataclass(frozen=True)
class TrainingReport:
    """What a training run says of itself.

    Args:
        losses: of all steps, before an interruption too.
        evaluations: (step, loss) on held-out text.
        base_bytes: bytes of the base that a process held, fewer where it was sharded; 0 where nothing was trained any more.
    """

    steps: int
    step_seconds: float
    resumed_from_step: int
    trainable_parameters: int
    losses: tuple[float, ...]
    evaluations: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None
    base_bytes: int = 0


class Interrupted(Stopped):
    """Training was asked to stop by signal `number` and has written a checkpoint at `step`."""

    def __init__(self, step: int, number: int):
        self.step = step
        super().__init__(number, f"stopped after step {step}")


def train_adapter(
    model: PeftModel,
    sequences: Dataset[dict[str, Tensor]] | Tensor,
    settings: TrainingSettings,
    work: Path,
    track: Track = untracked,
    held_out: Dataset[dict[str, Tensor]] | Tensor | None = None,
    logs: Path | None = None,
    teacher: PreTrainedModel | None = None,
    through: Through | None = None,
) -> TrainingReport:
    """Train the active adapter of `model`; checkpoints go to `work`, and the last one there is where it goes on from.

    Args:
        sequences: items with `input_ids` and `labels` (-100 where nothing is learnt), and what else the model's forward takes; or ids [count, tokens].
        held_out: what `evaluation_steps` are evaluated on; the adapter of the best evaluation is kept.
        logs: folder for TensorBoard's files.
        teacher: the float model, for an adapter that recovers it (`recovery.py`).
        through: what stands for the model while it is trained (`through.py`); it learns its ranges if it has any, at `range_learning_rate`.

    Raises:
        GridError: a packed layer does not compute its codes, see `assert_frozen`.
        TrainingError: see `check_trainable`, `ChunkedLoss` and `TrainedThrough`; the batch cannot be divided among the processes; or the loss is no number, or
            diverged.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; a checkpoint of the last finished step is in
            `work`.
    """
    trainable = check_trainable(model)
    if packed_layers(model):  # LoRA on floats is trained for comparisons
        assert_frozen(model)
    if settings.evaluation_steps and held_out is None:
        raise TrainingError("evaluation_steps asks for evaluation, but there is no held-out text")
    ranges = through.ranges if through is not None else None
    if (ranges is not None) != (settings.range_learning_rate is not None):
        raise TrainingError(
            "range_learning_rate goes with a graph that learns activation ranges; give both or neither"
        )
    last = last_checkpoint(work)
    if last and (
        final := final_checkpoint(
            last, settings.steps, settings.patience, settings.evaluation_steps is not None
        )
    ):  # stopped between the last step and the artifact
        if ranges is not None:
            load_ranges_(ranges, final)
        return _restore(model, last, final, settings, trainable)
    arguments = _arguments(settings, work, _world_size())
    stand_in = _stand_in(model, through, settings, teacher)
    vocabulary = vocabulary_size(causal_model(model)) if settings.divergence == "stop" else None
    watch = Watch(track, settings.checkpoint_steps, vocabulary, lambda: last_good(work))
    early = _early_stopping(settings, last)
    with _logging_to(logs, settings.report_to):
        trainer = AdapterTrainer(
            model,
            arguments,
            train_dataset=_dataset(sequences),
            eval_dataset=_dataset(held_out),
            callbacks=[watch, *early],
        )
        _drop_newer(trainer, work, last)
        if teacher is not None:
            teacher.to(arguments.device)  # type: ignore[arg-type] # transformers hides the signature
        trainer.recovery = Recovery(model, teacher) if teacher is not None else None
        if through is not None:
            _take_ranges_(trainer, through, settings)
        prepare_sharding_(trainer)
        _run(trainer, model, watch, stand_in, last)
    gather_(trainer)
    return _report(trainer.state, watch, settings, step_of(last) if last else 0, trainable)


def _run(
    trainer: AdapterTrainer,
    model: PeftModel,
    watch: Watch,
    stand_in: ChunkedLoss | TrainedThrough | None,
    last: Path | None,
) -> None:
    """Train; afterwards the model has its own forward again."""
    try:
        with on_stop_signal(watch.interrupt), lean_steps(model, trainer.args.bf16):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        if stand_in:
            stand_in.remove()
        if trainer.recovery:
            trainer.recovery.remove()
    if watch.interrupted is not None:
        raise Interrupted(trainer.state.global_step, watch.interrupted)


def _drop_newer(trainer: AdapterTrainer, work: Path, last: Path | None) -> None:
    """Delete what came after the checkpoint `last`, once each process has found it."""
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        delete_newer(work, last)


def _early_stopping(settings: TrainingSettings, last: Path | None) -> list[EarlyStoppingCallback]:
    """With what it had counted at `last`. The Trainer could restore it, but would make each callback anew and restore its control flags too."""
    if not settings.patience:
        return []
    stopping = EarlyStoppingCallback(settings.patience)
    stopping.early_stopping_patience_counter = waited(last) if last else 0
    return [stopping]


def _stand_in(
    model: PeftModel,
    through: Through | None,
    settings: TrainingSettings,
    teacher: PreTrainedModel | None,
) -> ChunkedLoss | TrainedThrough | None:
    """What takes the place of the model's forward while it is trained."""
    if through is None:
        return chunk_loss_(model) if settings.loss == "chunked" else None
    asked = {
        "chunked_loss": settings.loss == "chunked",
        "gradient_checkpointing": settings.gradient_checkpointing,
        "recovery": teacher is not None,
    }
    return TrainedThrough(
        model, through, _world_size(), **asked, bfloat16=settings.compute == "bfloat16"
    )


def _take_ranges_(trainer: AdapterTrainer, through: Through, settings: TrainingSettings) -> None:
    """Bring what stands for the model to the device that the Trainer has moved the model to, and let its ranges be trained."""
    through.to(trainer.args.device)
    trainer.goes_through = True
    if through.ranges is not None:
        trainer.ranges, trainer.range_learning_rate = (
            through.ranges,
            settings.range_learning_rate or 0.0,
        )
        trainer.add_callback(RangesCallback(through.ranges))


def check_loggers(report_to: Sequence[str]) -> None:
    """See that every logger is one that the Trainer knows and that its package is installed.

    Raises:
        MissingExtraError: it is not.
    """
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    for name in report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise MissingExtraError(f"report_to {name!r}: {error}") from error


def _report(
    state: TrainerState,
    watch: Watch,
    settings: TrainingSettings,
    resumed_from_step: int,
    trainable: int,
) -> TrainingReport:
    timed = watch.step_seconds[1:] or watch.step_seconds or [0.0]
    return TrainingReport(
        steps=state.global_step,
        step_seconds=sum(timed) / len(timed),
        resumed_from_step=resumed_from_step,
        trainable_parameters=trainable,
        losses=tuple(losses_of(state)),
        evaluations=_evaluations(state.log_history),
        best_step=state.best_global_step if settings.evaluation_steps else None,
        base_bytes=watch.base_bytes,
    )


def _restore(
    model: PeftModel, last: Path, final: Path, settings: TrainingSettings, trainable: int
) -> TrainingReport:
    with reading(final, model):
        set_peft_model_state_dict(model, load_file(final / WEIGHTS))
    state = read_state(last)
    losses = tuple(float(e["loss"]) for e in state["log_history"] if "loss" in e)
    best = state.get("best_global_step") if settings.evaluation_steps else None
    return TrainingReport(
        state["global_step"],
        0.0,
        state["global_step"],
        trainable,
        losses,
        _evaluations(state["log_history"]),
        best,
    )


def _evaluations(history: list[dict[str, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((int(e["step"]), float(e["eval_loss"])) for e in history if "eval_loss" in e)


def _dataset(
    sequences: Dataset[dict[str, Tensor]] | Tensor | None,
) -> Dataset[dict[str, Tensor]] | None:
    return as_sequences(sequences) if isinstance(sequences, Tensor) else sequences


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _arguments(settings: TrainingSettings, work: Path, processes: int) -> TrainingArguments:
    if settings.batch_sequences % processes:
        raise TrainingError(
            f"batch_sequences ({settings.batch_sequences}) cannot be divided among {processes} processes; give a multiple"
        )
    evaluates = settings.evaluation_steps is not None
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
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
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
        logging_nan_inf_filter=False,  # a loss that is nan must be seen
        seed=settings.seed,
        report_to=list(settings.report_to),
        label_names=["labels"],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False if processes > 1 else None,
        ddp_broadcast_buffers=False
        if processes > 1
        else None,  # the packed base, which never changes, would be sent at every step
    )
    if (
        arguments.n_gpu > 1
    ):  # a process keeps to one device: the Trainer would give each a batch, and a copy of the model that has its own loss
        arguments._n_gpu = 1
    return arguments


@contextlib.contextmanager
def _logging_to(logs: Path | None, report_to: Sequence[str]) -> Iterator[None]:
    """TensorBoard's callback takes its folder from the environment."""
    key = "TENSORBOARD_LOGGING_DIR"
    if logs is None or "tensorboard" not in report_to or key in os.environ:
        yield
        return
    os.environ[key] = str(logs)
    try:
        yield
    finally:
        del os.environ[key]
