"""bfloat16 and float16 models as float32 while a graph is captured.

`from_pretrained` keeps the checkpoint's dtype, so most models are bfloat16. They train in bfloat16,
but their graph computes in float32: 16-bit activation grids are finer than bfloat16, and ONNX
Runtime has no quantizers in half precision.

    packed weights    the same codes, scales and offsets, in the same memory
    float32 tensors   the same tensors (PEFT keeps LoRA weights in float32)
    half precision    cast to float32, which is exact

The graph of a bfloat16 model is therefore that of the base that `save_base` writes and `load_base`
reads. Its outputs differ from the model's own by the rounding of half-precision arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qwlora.nn.packed_layer import PackedLayer

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within, `model` computes in float32; afterwards every module has its own tensors back.

    What is captured within keeps the float32 tensors. Nested uses share the casts of the outermost.
    """
    layers = [m for m in model.modules() if isinstance(m, PackedLayer) and m.compute_dtype in HALF]
    types = [layer.compute_dtype for layer in layers]
    replaced = list(_half_tensors(model))
    cast = {id(tensor): _to_float32(tensor) for _, _, tensor in replaced}
    try:
        for layer in layers:
            layer.compute_dtype = torch.float32
        for table, key, tensor in replaced:
            table[key] = cast[id(tensor)]
        yield
    finally:
        for layer, dtype in zip(layers, types, strict=True):
            layer.compute_dtype = dtype
        for table, key, tensor in replaced:
            table[key] = tensor


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in float32 if it is in half precision; otherwise the tensor itself."""
    return tensor.float() if tensor.dtype in HALF else tensor


def _half_tensors(model: nn.Module) -> Iterator[tuple[dict[str, Tensor | None], str, Tensor]]:
    """Parameters and buffers in half precision, except the scales of packed layers: the dictionary
    that holds each, its key there, and the tensor."""
    for module in model.modules():
        tables = [module._parameters]
        if not isinstance(module, PackedLayer):
            tables.append(module._buffers)  # type: ignore[arg-type]
        for table in tables:
            for key, tensor in list(table.items()):
                if tensor is not None and tensor.dtype in HALF:
                    yield table, key, tensor  # type: ignore[misc]


def _to_float32(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().float(), requires_grad=tensor.requires_grad)
    return tensor.detach().float()
