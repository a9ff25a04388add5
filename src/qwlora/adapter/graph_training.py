"""Training through something that stands for the model: a graph that computes what the model will compute once it is quantized.

    loss = L(through(inputs), labels),    L the model's own loss function

The adapter's weights in it are the model's own parameters, so optimizer, checkpoints and files are as ever. What else it may learn (`ranges`: one number for
each activation grid) has a learning rate of its own, is not clipped, does not decay, and is part of every checkpoint (`RANGES`).

Given up: the logits of a whole batch exist, since the output head is inside the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.modeling_outputs import CausalLMOutput

from qwlora.adapter.chunked_loss import causal_model
from qwlora.errors import TrainingError

RANGES = "activation_ranges.safetensors"
_NOT_INPUTS = frozenset(
    {
        "labels",
        "num_items_in_batch",
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
    }
)


class Through(Protocol):
    """What stands for the model."""

    @property
    def ranges(self) -> nn.Parameter | None:
        """What is learned besides the adapter, if anything."""

    def __call__(self, **inputs: Any) -> Tensor:
        """Logits, differentiable in the adapter's weights and in `ranges`."""

    def to(self, device: torch.device) -> Any:
        """Follow the model to its device; parameters that are there already are not copied."""


class TrainedThrough:
    """Puts `through` in the place of the model's forward; `remove` gives the model back its own.

    Raises:
        TrainingError: the settings ask for what only the model's own forward can do.
    """

    def __init__(self, model: nn.Module, through: Through, processes: int, **asked: bool):
        if wrong := [name for name, is_asked in asked.items() if is_asked]:
            raise TrainingError(
                f"training goes through a graph, in which there is no {', no '.join(wrong).replace('_', ' ')}; leave that out"
            )
        if processes > 1:
            raise TrainingError(
                f"training goes through a graph, which {processes} processes cannot share; start one"
            )
        self._model, self._through = causal_model(model), through
        if getattr(self._model.config, "output_router_logits", False):
            raise TrainingError(
                "the model adds its routers' balance to the loss (output_router_logits), which is not in the graph; switch it off"
            )
        self._model.__dict__["forward"] = self._make_forward()

    def remove(self) -> None:
        """Give the model back its own forward."""
        del self._model.__dict__["forward"]

    def _make_forward(self) -> Callable[..., Any]:
        @functools.wraps(self._model.forward)
        def forward(**kwargs: Any) -> CausalLMOutput:
            logits = self._through(
                **{name: value for name, value in kwargs.items() if name not in _NOT_INPUTS}
            )
            labels = kwargs.get("labels")
            if labels is None:
                return CausalLMOutput(logits=logits)
            vocabulary = self._model.config.get_text_config().vocab_size
            items = (
                {"num_items_in_batch": kwargs["num_items_in_batch"]}
                if kwargs.get("num_items_in_batch") is not None
                else {}
            )
            loss = self._model.loss_function(
                logits=logits, labels=labels, vocab_size=vocabulary, **items
            )
            return CausalLMOutput(loss=loss, logits=logits)

        return forward


class RangesCallback(TrainerCallback):
    """Gradients of ranges are thrown away after each step; those of the model's own parameters the Trainer throws away itself."""

    def __init__(self, ranges: nn.Parameter):
        self.ranges = ranges

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ranges.grad = None


def add_ranges_(
    optimizer: torch.optim.Optimizer, ranges: nn.Parameter, learning_rate: float
) -> None:
    """Let the optimizer move ranges too."""
    optimizer.add_param_group({"params": [ranges], "lr": learning_rate, "weight_decay": 0.0})


def save_ranges(ranges: Tensor, folder: Path) -> None:
    """Part of a checkpoint."""
    save_file({"ranges": ranges.detach().cpu().contiguous()}, folder / RANGES)


def load_ranges_(ranges: nn.Parameter, folder: Path) -> None:
    """Go on from a checkpoint.

    Raises:
        TrainingError: it was written by a training that learned no ranges, or others.
    """
    try:
        found = load_file(folder / RANGES)["ranges"]
    except (OSError, KeyError, SafetensorError) as error:
        raise TrainingError(
            f"checkpoint {folder} holds no activation ranges ({error}); delete it, and train from the beginning"
        ) from error
    if found.shape != ranges.shape:
        raise TrainingError(
            f"checkpoint {folder} holds {found.numel()} activation ranges, and the graph has {ranges.numel()}; delete it, and train again"
        )
    with torch.no_grad():
        ranges.copy_(found)
