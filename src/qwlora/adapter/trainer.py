"""The Trainer of transformers, with what an adapter on a frozen base needs more of it; `train.py` says why it is this one.

    loss = the model's own [+ distance to the float model, while recovering]

A loss or gradient that is not finite stops before the step is taken. Checkpoints are plain PEFT adapters, whole ones where the model is sharded; learned ranges
of activations lie beside them. The loop is the Trainer's.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer

from qwlora.adapter.adapter_folder import write_adapter
from qwlora.adapter.fsdp import is_sharded, switch_on_, whole_adapter
from qwlora.adapter.graph_training import add_ranges_, load_ranges_, save_ranges
from qwlora.adapter.recovery_loss import Recovery
from qwlora.adapter.training_callbacks import first_gradient_not_finite, first_output_not_finite
from qwlora.adapter.training_checkpoints import last_good
from qwlora.errors import TrainingError


class AdapterTrainer(Trainer):
    """Looks at every loss and gradient before the step is taken, and writes checkpoints as plain adapters.

    Attributes:
        recovery: measures the distance to the float model, which is then part of the loss.
        ranges: activation ranges that are learned besides the adapter, at `range_learning_rate`.
        goes_through: whether a graph stands for the model, so that its layers do not run (`through.py`).
    """

    recovery: Recovery | None = None
    ranges: nn.Parameter | None = None
    range_learning_rate: float = 0.0
    goes_through: bool = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self._loss_shifts_labels = (
            True  # the Trainer counts targets by the name of the loss, which not every model has
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.ranges is not None and len(optimizer.param_groups) == 2:
            add_ranges_(optimizer, self.ranges, self.range_learning_rate)
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ranges is not None:
            load_ranges_(self.ranges, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ranges is not None:
            load_ranges_(self.ranges, Path(str(self.state.best_model_checkpoint)))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss; while recovering, the distance to the float model besides."""
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if self.recovery is None:
            return found
        distance = self.recovery.distance(inputs) / (
            self.args.gradient_accumulation_steps if model.training else 1
        )
        return (found[0] + distance, *found[1:]) if isinstance(found, tuple) else found + distance

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = switch_on_(self.accelerator)

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[Any]:
        """Accelerate wraps a model's forward in autocast, but not a sharded one's: there FSDP2's own policy would do, which is off (`shard.py`)."""
        return self.accelerator.autocast() if is_sharded(self) else contextlib.nullcontext()

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        sharded = is_sharded(self)
        if not bool(loss.isfinite()):
            unseen = sharded or self.goes_through  # the layers are elsewhere, or do not run
            name = None if unseen else self._first_output(inputs)
            where = (
                f"the output of {name} was the first that is not finite"
                if name
                else ""
                if unseen
                else "every layer's output was finite"
            )
            self._stop(f"the loss is {float(loss)}", where)
        if not sharded and (
            name := first_gradient_not_finite(self.accelerator.unwrap_model(self.model))
        ):
            self._stop(
                "a gradient is not finite",
                f"from the top of the model, that of {name} was the first",
            )
        if (
            self.ranges is not None
            and self.ranges.grad is not None
            and not bool(self.ranges.grad.isfinite().all())
        ):
            self._stop("a gradient is not finite", "that of the activation ranges")
        return loss

    def _first_output(self, inputs: dict[str, Any]) -> str | None:
        model = self.accelerator.unwrap_model(self.model)

        def forward() -> None:
            with self.compute_loss_context_manager():
                model(**self._prepare_inputs(inputs))

        return first_output_not_finite(model, forward)

    def _stop(self, what: str, where: str) -> None:
        raise TrainingError(
            f"{what} at step {self.state.global_step + 1}{f'; {where}' if where else ''}; {last_good(Path(str(self.args.output_dir)))}. "
            f"Lower the learning rate (now {self.args.learning_rate:g}), raise warmup_steps, or look at what is trained on"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A sharded checkpoint holds the whole adapter besides, so that a run that had ended needs no processes to be restored.

        The Trainer asks, on each process, whether the best checkpoint's folder is there, before it would make it; writing here makes it in time.
        """
        if is_sharded(self):
            state = whole_adapter(self.accelerator.unwrap_model(self.model))
            if self.args.should_save:
                write_adapter(
                    self.accelerator.unwrap_model(self.model),
                    Path(str(output_dir or self.args.output_dir)),
                    state,
                )
        super().save_model(output_dir, _internal_call)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            write_adapter(self.accelerator.unwrap_model(self.model), folder, state_dict)
            if self.ranges is not None:
                save_ranges(self.ranges, folder)
