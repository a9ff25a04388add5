"""Exported files with the interface of a transformers model, for `generate`.

    model = ExportedModel(TARGETS["hf"].open(bundle, "first"), like)
    model.generate(input_ids=ids, max_new_tokens=20)

A runtime is asked for the logits of whole sequences, without keys and values of earlier tokens, so
each new token runs the whole sequence again.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from qwlora.export.runtime import Runtime


class ExportedModel(PreTrainedModel, GenerationMixin):
    """A causal language model without weights, whose logits come from somewhere else.

    Args:
        runtime: computes logits of token ids [1, tokens], none of them masked.
        like: the model that was exported, for its configuration; may be without weights.
    """

    main_input_name = "input_ids"

    def __init__(self, runtime: Runtime, like: PreTrainedModel):
        config = copy.deepcopy(like.config)
        config._attn_implementation = "eager"  # of no effect, but transformers checks it
        super().__init__(config)
        self._runtime = runtime
        self.config.use_cache = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self._runtime.logits(input_ids))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, without a cache."""
        return super().generate(*args, **{**kwargs, "use_cache": False})
