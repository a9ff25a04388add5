"""Recovery: an adapter that brings the frozen base back to the float model it came from, before anything is learnt.

    loss = language loss + sum_t |h_t - g_t|^2 / sum_t |g_t|^2,    t without padding

h and g are what the output heads of base-with-adapter and of the float model read. Padding is what the attention mask leaves out, or without one what stands
after a sequence's last learnt token. What is won back so is the start of adapters that learn a task: one recovery serves many.
Source: RILQ (Lee et al. 2024, https://arxiv.org/abs/2412.01129), whose model-level loss this is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwlora.adapter.chunked_loss import IGNORED, causal_model
from qwlora.errors import TrainingError


class _AtHeadError(Exception):
    """The float model has reached its head; its logits are not needed."""


class Recovery:
    """Watches what reaches the heads of `model` and `teacher`, which are on one device.

    Raises:
        TrainingError: one of them has no output head, or the two differ in width.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module):
        self._teacher = teacher.eval().requires_grad_(False)
        self._student_state: Tensor | None = None
        self._teacher_state: Tensor | None = None
        heads = [causal_model(m).get_output_embeddings() for m in (model, teacher)]
        if any(head is None for head in heads):
            raise TrainingError("recovery compares what output heads read, and the model has none")
        self._hooks = [
            model.register_forward_pre_hook(self._begin),
            heads[0].register_forward_pre_hook(self._keep),
            heads[1].register_forward_pre_hook(self._stop),
        ]

    def distance(self, inputs: Mapping[str, Any]) -> Tensor:
        """The second term of the loss, for the inputs of the model's last forward."""
        given = {
            name: value
            for name, value in inputs.items()
            if name not in ("labels", "num_items_in_batch")
        }
        with torch.no_grad(), contextlib.suppress(_AtHeadError):
            self._teacher(**given, use_cache=False)
        h, g = self._student_state, self._teacher_state
        assert h is not None
        assert g is not None
        self._student_state = self._teacher_state = None
        if h.shape != g.shape:
            raise TrainingError(
                f"the float model's last hidden state is {list(g.shape)}, the base's {list(h.shape)}: they are not one model"
            )
        real = _real(inputs, h)[..., None]
        off, size = ((x.square() * real).sum() for x in (h.float() - g.float(), g.float()))
        return off / size.clamp_min(torch.finfo(size.dtype).tiny)

    def remove(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._student_state = None

    def _keep(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if (
            self._student_state is None
        ):  # the chunked loss calls the head again, with less, where the model changes its logits
            self._student_state = args[0]

    def _stop(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._teacher_state = args[0]
        raise _AtHeadError


def _real(inputs: Mapping[str, Any], state: Tensor) -> Tensor:
    """Which tokens are no padding, [batch, tokens] on the device of `state`."""
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.to(state.device) > 0
    if labels is None:
        return torch.ones(state.shape[:-1], dtype=torch.bool, device=state.device)
    return (labels.to(state.device) != IGNORED).flip(-1).cumsum(-1).flip(-1) > 0
