"""Exported files in their runtime, with the interface of a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from qwlora.simulation.simulated_model import SimulatedModel
from qwlora.targets.target import Runtime


def runtime_model(runtime: Runtime, like: PreTrainedModel) -> SimulatedModel:
    """A model with the configuration of `like` whose logits `runtime` computes."""
    ids = torch.empty(1, 0, dtype=torch.int64)  # of the last call for one token
    cache: Any = {}

    def run(input_ids: Tensor, logits_to_keep: int | Tensor = 0, **_: Any) -> CausalLMOutput:
        nonlocal ids, cache
        if logits_to_keep != 1:
            ids, cache = ids[:, :0], {}  # a runtime with one cache uses it for this sequence
            return CausalLMOutput(logits=runtime.logits(input_ids))
        # Greedy decoding repeats the text with one more token, which is all that is new to the
        # cache. After any other text, the cache is of no use.
        known = ids.shape[1]
        if input_ids.shape[1] <= known or not torch.equal(input_ids[:, :known], ids):
            known, cache = 0, {}
        logits, cache = runtime.extend(input_ids[:, known:], cache)
        ids = input_ids
        return CausalLMOutput(logits=logits)

    return SimulatedModel(run, like, keeps_logits=True)
