"""Training on a captured graph that computes what the model computes once it is quantized.

    loss = L(graph(inputs), labels),    L the model's own loss function

The adapter weights in the graph are the model's own parameters, so the optimizer, checkpoints and
files are the same as for other training.

Given up: the logits of a whole batch exist, because the output head is inside the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from qwlora.adapter.chunked_loss import causal_model
from qwlora.errors import TrainingError
from qwlora.nn.replaced import replaced

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

    def __call__(self, **inputs: Any) -> Tensor:
        """Logits, differentiable in the adapter's weights."""

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
