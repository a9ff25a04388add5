"""Training on a captured graph that computes what the model computes once it is quantized.

    loss = L(graph(inputs), labels),    L the model's own loss function

The adapter weights in the graph are the model's own parameters, so the optimizer, checkpoints and
files are the same as for other training.

Given up: the logits of a whole batch exist, because the output head is inside the graph.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from qwlora.adapter.chunked_loss import causal_model
from qwlora.errors import TrainingError
from qwlora.nn.temporary import replaced

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

    Raises:
        TrainingError: several processes, or a router loss, which a graph does not support.
            What else it does not support is refused in the recipe (`Adapter.without_graph`).
    """

    def __init__(self, model: nn.Module, graph: TrainableGraph, processes: int):
        if processes > 1:
            raise TrainingError(
                "training on quantized activations (a captured graph) does not support "
                f"{processes} processes. Start one"
            )
        inner = causal_model(model)
        if getattr(inner.config, "output_router_logits", False):
            raise TrainingError(
                "the model adds a router balance term to its loss (output_router_logits), which a "
                "captured graph does not contain. Set output_router_logits to false"
            )

        @functools.wraps(inner.forward)
        def forward(**kwargs: Any) -> CausalLMOutput:
            logits = graph(**{k: value for k, value in kwargs.items() if k not in _NOT_INPUTS})
            if kwargs.get("labels") is None:
                return CausalLMOutput(logits=logits)
            items = {k: kwargs[k] for k in ("num_items_in_batch",) if kwargs.get(k) is not None}
            vocabulary = inner.config.get_text_config().vocab_size
            loss = inner.loss_function(
                logits=logits, labels=kwargs["labels"], vocab_size=vocabulary, **items
            )
            return CausalLMOutput(loss=loss, logits=logits)

        self._replaced = replaced(inner, forward)
        self._replaced.__enter__()

    def remove(self) -> None:
        """Restore the model's own forward."""
        self._replaced.__exit__(None, None, None)
