"""The forward of a LoRA layer on packed codes, summed in one output array.

    u = scaling * lora_A(dropout(x)),    y = lora_B(u),    y += x W_hat^T + b

PEFT computes the base's product, computes the adapter's, scales it and adds the two: four arrays of
the output's size, and one more for the gradient of the scaling. Here there is one. The base's
product comes last and saves nothing for backward. Recomputation of a checkpointed layer ends when
all saved tensors exist, so it skips the base's product in the layer's last linear (down_proj, a
quarter of a Llama layer's products). Under autocast, x is rounded once instead of once per product.
Results equal PEFT's up to rounding order.

PEFT's forward remains for everything but plain LoRA on a plain packed layer: DoRA and other
variants, several active adapters, merged or disabled adapters, layers with hooks or with a forward
set on the instance, and traced graphs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from qwlora.nn import PackedLinear
from qwlora.nn.packed_tensor import compute_dtype
from qwlora.nn.temporary import replaced


@contextlib.contextmanager
def fused_lora(model: nn.Module) -> Iterator[None]:
    """Give the plain LoRA layers of `model` the fused forward, until the context ends."""
    layers: list[Any] = [
        m
        for m in model.modules()
        if type(m) is LoraLinear
        and "forward" not in m.__dict__
        and isinstance(m.base_layer, PackedLinear)
    ]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced(layer, functools.partial(_forward, layer)))
        yield


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    adapter, dtype = "".join(active[:1]), compute_dtype(x)
    is_plain = len(active) == 1 and not (  # the equation above is all that `layer` computes
        args
        or kwargs
        or layer.disable_adapters
        or layer.merged
        or adapter in layer.lora_variant
        or layer.lora_B[adapter].bias is not None
        or not layer.base_layer.is_plain
        or torch.compiler.is_compiling()
        or x.ndim < 2
        or dtype == x.dtype != layer.lora_A[adapter].weight.dtype
    )
    if not is_plain:
        return LoraLinear.forward(layer, x, *args, **kwargs)
    x, lora_a, lora_b = x.to(dtype), layer.lora_A[adapter], layer.lora_B[adapter]
    u = lora_a(layer.lora_dropout[adapter](x)) * layer.scaling[adapter]
    return layer.base_layer.add_to(lora_b(u), x)
