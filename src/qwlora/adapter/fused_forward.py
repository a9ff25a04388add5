"""The forward of a LoRA layer on packed codes, as one sum in one memory.

    u = scaling * lora_A(dropout(x)),    y = lora_B(u),    y += x W_hat^T + b

PEFT computes the base's product first, then the adapter's, scales it and adds the two: four arrays as large as the output, where here is one; and its gradient
makes another for the scaling. Here the base comes last, and keeps nothing for its gradient. So a checkpointed layer, which is computed again only until
everything is there that gradients need, leaves out the base's product in its last linear layer (down_proj), a quarter of a llama's. Under autocast x is
rounded once, not by each product. Sums are the same but for the order in which they are rounded.

What is not plain LoRA on a plain packed layer keeps PEFT's forward: DoRA and other variants, several adapters at a time, merged or switched off ones, layers
with hooks or a forward of their own, and graphs that are traced.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from qwlora.nn.packed_tensor import compute_dtype


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """While it lasts, the LoRA layers of `model` that can compute as one sum."""
    layers: list[Any] = [
        m
        for m in model.modules()
        if type(m) is LoraLinear and "forward" not in m.__dict__ and hasattr(m.base_layer, "add_to")
    ]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if args or kwargs or len(active) != 1 or not _can(layer, active[0]):
        return LoraLinear.forward(layer, x, *args, **kwargs)
    adapter, dtype = active[0], compute_dtype(x)
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    if x.ndim < 2 or dtype == x.dtype != down.weight.dtype:
        return LoraLinear.forward(layer, x)
    x = x.to(dtype)
    return layer.base_layer.add_to(
        up(down(layer.lora_dropout[adapter](x)) * layer.scaling[adapter]), x
    )


def _can(layer: Any, adapter: str) -> bool:
    plain = not (layer.disable_adapters or layer.merged or adapter in layer.lora_variant)
    return (
        plain
        and layer.lora_B[adapter].bias is None
        and layer.base_layer.is_plain
        and not torch.compiler.is_compiling()
    )
