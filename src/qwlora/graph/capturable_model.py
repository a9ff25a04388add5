"""The form in which a model is captured: float32, with attention and experts as separate operators.

    attention         "eager": two matrix products and a softmax. Other implementations are one
                      operator, as are nn.MultiheadAttention and nn.TransformerEncoderLayer
    experts           "batched_mm": one node per product. The default is one opaque operator;
                      "eager" has loops that depend on data, which cannot be captured
    packed weights    the same codes, scales and offsets, in the same memory
    float32 tensors   the same tensors (PEFT keeps LoRA weights in float32)
    half precision    cast to float32, which is exact

The graph of a bfloat16 model computes what the saved base (`save_base`, `load_base`) computes. Its
outputs differ from those of the model by the rounding of half-precision arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwlora.nn.packed_layer import PackedLayer, is_packed

# Models in these dtypes train in them, but their graphs compute in float32: 16-bit activation grids
# are finer than bfloat16, and ONNX Runtime has no quantizers in half precision.
HALF = (torch.bfloat16, torch.float16)
ATTENTION, EXPERTS = "eager", "batched_mm"
# transformers stores both choices in the model's config
_CHOICES = ("_attn_implementation_internal", "_experts_implementation_internal")


@contextmanager
def visible_implementations(model: nn.Module) -> Iterator[None]:
    """Within, attention and experts inside `model` use implementations that can be captured."""
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    configs = {id(model.config): model.config for model in models}.values()
    before = [(c, key, vars(c)[key]) for c in configs for key in _CHOICES if key in vars(c)]
    is_fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        # the outer model sets it for its inner models
        inside: set[nn.Module] = set()
        for outer in models:
            if outer not in inside:
                inside.update(outer.modules())
                if outer._can_set_attn_implementation():
                    outer.set_attn_implementation(ATTENTION)
                outer.set_experts_implementation(EXPERTS)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fused)
        for config, key, choice in before:
            setattr(config, key, choice)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within, `model` computes in float32; afterwards every module has its own tensors back."""
    # Graphs captured inside keep the float32 tensors. Nested uses share the outermost's casts.
    packed = [m for m in model.modules() if isinstance(m, PackedLayer) and m.compute_dtype in HALF]
    # the dictionary that holds a value, its key there, and the value
    replaced: list[tuple[dict[str, Any], str, Any]] = [
        (table, key, tensor)
        for module in model.modules()
        # the buffers of a packed layer are scales, which stay
        for table in (module._parameters, {} if is_packed(module) else module._buffers)
        for key, tensor in table.items()
        if tensor is not None and tensor.dtype in HALF
    ]
    replaced += [(vars(layer), "compute_dtype", layer.compute_dtype) for layer in packed]
    cast = {id(value): _to_float32(value) for _, _, value in replaced}
    try:
        for table, key, value in replaced:
            table[key] = cast[id(value)]
        yield
    finally:
        for table, key, value in replaced:
            table[key] = value


def _to_float32(value: Tensor | torch.dtype) -> Tensor | torch.dtype:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().float(), requires_grad=value.requires_grad)
    return value.detach().float() if isinstance(value, Tensor) else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in float32 if it is in half precision; otherwise the tensor itself."""
    return tensor.float() if tensor.dtype in HALF else tensor
