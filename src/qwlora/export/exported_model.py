"""Exported files with the interface of a transformers model, for `generate`.

    model = ExportedModel(logits, like)
    model.generate(input_ids=ids, max_new_tokens=20)

A runtime is asked for the logits of whole sequences, without keys and values of earlier tokens, so
each new token runs the whole sequence again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from qwlora.export.target import BundleTarget, GraphTarget, Target, UseCasesTarget

Logits = Callable[[Tensor], Tensor]


def exported_logits(target: Target, folder: Path, base: Path) -> Logits:
    """Logits that a target's runtime computes of token ids [1, tokens].

    Args:
        folder: the exported files of an adapter.
        base: those of the base, of a bundle target.

    Raises:
        MissingExtraError: a package of the runtime is missing.
        ExportError: the runtime refuses the files.
    """
    target.require_packages()
    if isinstance(target, GraphTarget):
        return target.logits(folder)
    assert isinstance(target, BundleTarget)
    runtime = target.open(base)
    runtime.use(folder)
    return runtime.logits


def use_case_logits(target: UseCasesTarget, folder: Path, case: str) -> Logits:
    """`exported_logits` of one use case.

    Raises:
        VerificationError, ExportError: see `UseCasesTarget.logits`.
    """
    target.require_packages()
    return target.logits(folder, case)


class ExportedModel(PreTrainedModel, GenerationMixin):
    """A causal language model without weights, whose logits come from somewhere else.

    Args:
        logits: of token ids [1, tokens], none of them masked.
        like: the model that was exported, for its configuration; may be without weights.
    """

    main_input_name = "input_ids"

    def __init__(self, logits: Logits, like: PreTrainedModel):
        config = copy.deepcopy(like.config)
        config._attn_implementation = "eager"  # of no effect, but transformers checks it
        super().__init__(config)
        self._logits = logits
        self.config.use_cache = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self._logits(input_ids))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, without a cache."""
        return super().generate(*args, **{**kwargs, "use_cache": False})
