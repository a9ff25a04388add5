"""Training on a captured graph that computes what the model computes once it is quantized.

    loss = L(graph(inputs), labels),    L the model's own loss function

The adapter weights in the graph are the model's own parameters, so the optimizer, checkpoints and
files are the same as for other training. A graph may also learn activation ranges, one number per
activation grid. They have a learning rate of their own, are neither clipped nor decayed, and are
saved with every checkpoint (file `RANGES`).

Given up: the logits of a whole batch exist, because the output head is inside the graph.
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
from qwlora.nn.replaced import replaced

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


class TrainableGraph(Protocol):
    """A graph that replaces the model's forward; see `simulation.training_graph.TrainingGraph`."""

    @property
    def ranges(self) -> nn.Parameter | None:
        """Activation ranges to learn along with the adapter; None if they are fixed."""

    def __call__(self, **inputs: Any) -> Tensor:
        """Logits, differentiable in the adapter's weights and in `ranges`."""

    def to(self, device: torch.device) -> Any:
        """Move to the model's device; parameters that are there already are not copied."""


class GraphForward:
    """Replaces the forward of `model` by `graph`; `remove` restores it.

    Args:
        processes: number of training processes.
        requested: settings that a graph does not support: name, and whether it is on.

    Raises:
        TrainingError: a requested setting, several processes, or a router loss, none of which a
            graph supports.
    """

    def __init__(self, model: nn.Module, graph: TrainableGraph, processes: int, **requested: bool):
        if unsupported := [name for name, is_on in requested.items() if is_on]:
            raise TrainingError(
                "training on quantized activations (a captured graph) does not support "
                f"{', '.join(unsupported).replace('_', ' ')}. Turn it off for this adapter"
            )
        if processes > 1:
            raise TrainingError(
                "training on quantized activations (a captured graph) does not support "
                f"{processes} processes. Start one"
            )
        self._model, self._graph = causal_model(model), graph
        if getattr(self._model.config, "output_router_logits", False):
            raise TrainingError(
                "the model adds a router balance term to its loss (output_router_logits), which a "
                "captured graph does not contain. Set output_router_logits to false"
            )
        self._replaced = replaced(self._model, self._make_forward())
        self._replaced.__enter__()

    def remove(self) -> None:
        """Restore the model's own forward."""
        self._replaced.__exit__(None, None, None)

    def _make_forward(self) -> Callable[..., Any]:
        @functools.wraps(self._model.forward)
        def forward(**kwargs: Any) -> CausalLMOutput:
            logits = self._graph(
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
    """Clears the gradient of the ranges after each step; the Trainer clears only the model's."""

    def __init__(self, ranges: nn.Parameter):
        self.ranges = ranges

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ranges.grad = None


def add_ranges_(
    optimizer: torch.optim.Optimizer, ranges: nn.Parameter, learning_rate: float
) -> None:
    """Add the ranges to the optimizer, as a group with its own learning rate."""
    optimizer.add_param_group({"params": [ranges], "lr": learning_rate, "weight_decay": 0.0})


def save_ranges(ranges: Tensor, folder: Path) -> None:
    """Save the ranges in the checkpoint `folder`."""
    save_file({"ranges": ranges.detach().cpu().contiguous()}, folder / RANGES)


def load_ranges_(ranges: nn.Parameter, folder: Path) -> None:
    """Load the ranges from the checkpoint `folder`, in place.

    Raises:
        TrainingError: the checkpoint has no ranges, or another number of them.
    """
    try:
        found = load_file(folder / RANGES)["ranges"]
    except (OSError, KeyError, SafetensorError) as error:
        raise TrainingError(
            f"checkpoint {folder} has no activation ranges ({error}). Delete it to train from the "
            "start"
        ) from error
    if found.shape != ranges.shape:
        raise TrainingError(
            f"checkpoint {folder} has {found.numel()} activation ranges, but the graph has "
            f"{ranges.numel()}. Delete it to train from the start"
        )
    with torch.no_grad():
        ranges.copy_(found)
