"""Exported files with the interface of a transformers model, for `generate`.

    model = ExportedModel(runtime, like)
    model.generate(input_ids=ids, max_new_tokens=20)

The exported graph takes no keys and values of earlier tokens, so each new token runs the whole
sequence again.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from qwlora.export.verify import Runtime


class ExportedModel(PreTrainedModel, GenerationMixin):
    """A causal language model that computes its logits in `runtime`; it has no weights.

    Args:
        runtime: the opened files, which take `input_ids` and `attention_mask`.
        like: the model that was exported, for its configuration; may be without weights.
    """

    main_input_name = "input_ids"

    def __init__(self, runtime: Runtime, like: PreTrainedModel):
        config = copy.deepcopy(like.config)
        config._attn_implementation = "eager"  # of no effect, but transformers checks it
        super().__init__(config)
        self.runtime = runtime
        self.config.use_cache = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        found = self.runtime.run({"input_ids": input_ids, "attention_mask": mask})
        return CausalLMOutput(logits=found["logits"])

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, without a cache."""
        return super().generate(*args, **{**kwargs, "use_cache": False})
