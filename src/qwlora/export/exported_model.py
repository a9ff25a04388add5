"""Exported files with the interface of a transformers model, for `generate`.

    model = ExportedModel(TARGETS["hf"].open(bundle, "first"), like)
    model.generate(input_ids=ids, max_new_tokens=20)

A runtime is asked for the logits of whole sequences, without keys and values of earlier tokens, so
each new token runs the whole sequence again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from qwlora.export.runtime import Runtime
from qwlora.simulation.simulated_model import SimulatedModel


class ExportedModel(SimulatedModel):
    """A causal language model whose logits a runtime computes.

    Args:
        runtime: computes logits of token ids [1, tokens], none of them masked.
        like: the model that was exported, for its configuration; may be without weights.
    """

    def __init__(self, runtime: Runtime, like: PreTrainedModel):
        def run(input_ids: Tensor, **_: Any) -> CausalLMOutput:
            return CausalLMOutput(logits=runtime.logits(input_ids))

        super().__init__(run, like)
