"""A simulation, exported files or any other source of logits as a transformers model.

    model = simulation.as_model()
    model(input_ids=ids, attention_mask=mask, labels=labels)    # simulated logits, and their loss
    model.generate(ids, max_new_tokens=20)    # with a graph, each step runs the whole sequence
    model.to("cuda")                          # moves the simulation, not the captured model

It has the original model's configuration and loss, but no layers, gradients, hidden states,
attentions or caches. Batches padded on the left need `position_ids` in the example inputs of
`simulate`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from qwlora.errors import CaptureError, foreign_as
from qwlora.system.device import device_of


class SimulatedModel(PreTrainedModel, GenerationMixin):
    """A transformers model for evaluation.

    Args:
        run: function of the call's arguments by name, without labels; returns the model's output.
        like: the model that was captured or exported; its weights are not needed.
        keeps_logits: whether `run` takes `logits_to_keep` and may return only these logits.
    """

    def __init__(self, run: Callable[..., Any], like: PreTrainedModel, keeps_logits: bool = False):
        config = copy.deepcopy(like.config)
        config._attn_implementation = "eager"  # of no effect, but transformers checks it
        super().__init__(config)
        self.simulation, self.name, self._keeps_logits = run, type(like).__name__, keeps_logits
        self.loss_type, self.main_input_name = like.loss_type, like.main_input_name
        self.generation_config = copy.deepcopy(like.generation_config)
        self.config.use_cache = False
        self.training = False

    @property
    def device(self) -> torch.device:
        return device_of(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Any = None,
        **more: Any,
    ) -> Any:
        """Logits in the output class of the model.

        Raises:
            CaptureError: an argument is missing or not supported by the graph, or the loss of
                `labels` needs more than logits.
        """
        for name in ("output_hidden_states", "output_attentions", "use_cache"):
            if more.pop(name, None):
                raise CaptureError(f"{name}: this model returns logits only; omit the argument")
        names = ("input_ids", "attention_mask", "position_ids")
        tensors = zip(names, (input_ids, attention_mask, position_ids), strict=True)
        given = {name: tensor for name, tensor in tensors if tensor is not None}
        if self._keeps_logits:
            more["logits_to_keep"] = logits_to_keep
        with torch.no_grad():
            output = self.simulation(**given, **more)
            # 0 keeps all, as in transformers
            if not isinstance(logits_to_keep, int) or logits_to_keep:
                last = isinstance(logits_to_keep, int)
                kept = slice(-logits_to_keep, None) if last else logits_to_keep
                output["logits"] = output["logits"][:, kept]
            if labels is not None:
                loss = self._loss(output.get("logits"), labels, num_items_in_batch)
                output = type(output)(loss=loss, **output)
        return output.to_tuple() if return_dict is False else output

    def _loss(self, logits: Tensor | None, labels: Tensor, count: Any) -> Tensor:
        """`loss_function` of these logits, averaged over `count` labels. None: the batch's own."""
        config = self.config
        problem = f"the loss of {self.name} needs more than logits and labels"
        remedy = "compute it from the outputs, without labels"
        # an encoder-decoder shifts labels in its forward, and a router's loss is added there
        is_more = config.is_encoder_decoder or getattr(config, "output_router_logits", False)
        if logits is None or is_more:
            raise CaptureError(f"{problem}; {remedy}")
        with foreign_as(CaptureError, problem, remedy):
            loss: Tensor = self.loss_function(
                logits=logits,
                pooled_logits=logits,
                labels=labels,
                config=config,
                vocab_size=getattr(config.get_text_config(), "vocab_size", None),
                **({} if count is None else {"num_items_in_batch": count}),
            )
        return loss

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, without its cache."""
        if self.config.is_encoder_decoder:
            raise CaptureError(
                f"generate runs encoder and decoder of {self.name} separately, and the simulated "
                "graph has both. Call the model with decoder_input_ids, and append the token that "
                "the last logits choose"
            )
        return super().generate(*args, **{**kwargs, "use_cache": False})

    def train(self, mode: bool = True) -> Self:
        """Refuse training: the graph computes evaluation."""
        if mode:
            raise CaptureError(
                "a simulated model is for evaluation; train the adapter before simulating it, or "
                "with workflow: qwa-lora"
            )
        return self

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Does nothing: tied weights are one in the graph. Evaluation harnesses call it."""

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: save the base, the adapter and the simulation instead."""
        raise CaptureError(
            "a simulated model is not a checkpoint; save the base, the adapter and the simulation "
            "(simulation.save(folder))"
        )
