"""Recovery: train an adapter that brings the quantized base back to the float model.

    loss = language loss + sum_t |h_t - g_t|^2 / sum_t |g_t|^2,    t over all tokens but padding

h and g [tokens, hidden] are the inputs of the output heads of base-with-adapter and of the float
model (the teacher). Padding is what the attention mask excludes; without a mask, what follows the
last loss token of a sequence. A recovered adapter is a starting point for adapters of any task.

Source: the model-level loss of RILQ (Lee et al. 2024, https://arxiv.org/abs/2412.01129).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwlora.adapter.chunked_loss import causal_model
from qwlora.data.sequences import IGNORED
from qwlora.errors import TrainingError


class _HeadReachedError(Exception):
    """Ends the teacher's forward at its head: its logits are not needed."""


class RecoveryLoss(contextlib.ExitStack):
    """The second term of the loss. Until the context ends, hooks capture the inputs of the heads of
    `model` and `teacher`, which must be on one device.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module):
        super().__init__()
        self._teacher = teacher.eval().requires_grad_(False)
        self._student_state: Tensor | None = None
        self._teacher_state: Tensor | None = None
        heads = [causal_model(m).get_output_embeddings() for m in (model, teacher)]
        if any(head is None for head in heads):
            raise TrainingError(
                "recovery compares the inputs of output heads, but the model has no output head"
            )
        for hook in (
            model.register_forward_pre_hook(lambda *_: setattr(self, "_student_state", None)),
            heads[0].register_forward_pre_hook(self._capture),
            heads[1].register_forward_pre_hook(self._capture_teacher),
        ):
            self.callback(hook.remove)

    def distance(self, inputs: Mapping[str, Any]) -> Tensor:
        """The second term of the loss, a scalar, for the inputs of the model's last forward."""
        forward_inputs = {
            name: value
            for name, value in inputs.items()
            if name not in ("labels", "num_items_in_batch")
        }
        with torch.no_grad(), contextlib.suppress(_HeadReachedError):
            self._teacher(**forward_inputs, use_cache=False)
        h, g = self._student_state, self._teacher_state
        assert h is not None
        assert g is not None
        self._student_state = self._teacher_state = None
        if h.shape != g.shape:
            raise TrainingError(
                f"the last hidden state has shape {list(g.shape)} in the float model and "
                f"{list(h.shape)} in the base. Recover with the float model that the base was "
                "quantized from"
            )
        mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            is_token = mask.to(h.device) > 0
        elif labels is not None:
            is_token = (labels.to(h.device) != IGNORED).flip(-1).cumsum(-1).flip(-1) > 0
        else:
            is_token = torch.ones(h.shape[:-1], dtype=torch.bool, device=h.device)
        off, size = (
            (x.square() * is_token[..., None]).sum() for x in (h.float() - g.float(), g.float())
        )
        return off / size.clamp_min(torch.finfo(size.dtype).tiny)

    def _capture(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # Only the first call of a forward: the chunked loss calls the head again, on parts.
        if self._student_state is None:
            self._student_state = args[0]

    def _capture_teacher(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._teacher_state = args[0]
        raise _HeadReachedError
