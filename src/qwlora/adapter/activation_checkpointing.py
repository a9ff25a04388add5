"""Gradient checkpointing with what it keeps in memory of its own.

Between forward and backward pass a checkpointed model keeps each layer's input [batch, tokens, hidden]. On a processor malloc puts these among the blocks that
a layer needs for a moment, and they hold the holes open: 550 MB of holes in a step of SmolLM2 at 4 x 512 tokens by PEFT's own forward, where what is kept
weighs 141 MB. Here the output of each checkpointed layer is copied into a mapping of its own, which the system has back when the backward pass has used it; and
holes that either pass leaves go back after every few layers. The numbers are the same.

Nothing is done on other devices, whose allocators keep large blocks apart, nor outside Linux.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qwlora.system.memory import give_back

_LARGE_BYTES = 2**20  # below this a copy costs more than a hole
_WORTH_TRIMMING = (
    2**22
)  # of a layer's input: the layer makes some twenty times as much, and giving that back takes longer than it saves below this
_LAYERS_BETWEEN = 3  # trimming at each layer takes longer and saves no more


@contextlib.contextmanager
def kept_apart(model: nn.Module) -> Iterator[None]:
    """While it lasts, the checkpointed layers of `model` hand their outputs on in mappings of their own."""
    layers = (
        [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if sys.platform == "linux"
        else []
    )
    hooks = [
        layer.register_forward_hook(functools.partial(_move, number % _LAYERS_BETWEEN == 0))
        for number, layer in enumerate(reversed(layers))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _move(trims: bool, layer: Any, inputs: Any, output: Any) -> Any:
    if not (layer.training and layer.gradient_checkpointing and torch.is_grad_enabled()):
        return None
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor) or first.device.type != "cpu" or first.nbytes < _LARGE_BYTES:
        return None
    moved: Tensor = _Moved.apply(first, trims and first.nbytes >= _WORTH_TRIMMING)
    return (moved, *output[1:]) if isinstance(output, tuple) else moved


class _Moved(torch.autograd.Function):
    """A copy in its own mapping, in huge pages where the system has them; `trims` says whether holes go back, in either pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trims: bool) -> Tensor:
        ctx.trims = trims
        if trims:
            give_back()
        mapping = mmap.mmap(-1, x.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(mapping, dtype=x.dtype).view(x.shape).copy_(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.trims:
            give_back()
        return gradient, None
