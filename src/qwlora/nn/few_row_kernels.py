"""Products of a few rows with packed weights, by torch's own integer kernels for the CPU.

    use_few_row_kernels_(model)
    model.generate(ids)

A product with one row of activations reads every weight once, so unpacking it first costs more than
the product itself. These kernels read the codes:

    int4    y = x ((q - 8) * scale + zero)^T    _weight_int4pack_mm_for_cpu; 2 to 4 bits, in rows or
                                                blocks of a multiple of 32
    int8    y = x q^T * scale                   _weight_int8pack_mm; symmetric rows of 8 bits

They compute in bfloat16: activations, scales and zeros are rounded to 8 bits of mantissa, an error
of about 0.3 % of a product. So they are for generating text; neither evaluation nor a proof uses
them. Products of more than ROWS rows (the prompt), and layers on other grids, stay exact. The codes
are copied into the kernel's own order: another half byte per weight of the int4 kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qwlora.grid.scheme import Blocks, PerChannel, Scheme
from qwlora.nn.packed_layer import PackedLinear

ROWS = 16
_BLOCKS = (256, 128, 64, 32)  # what the int4 kernel supports
_OUTPUTS = 16  # it computes this many outputs at once

Product = Callable[[Tensor], Tensor]  # bfloat16 [rows, in] -> [rows, out]


def use_few_row_kernels_(model: nn.Module) -> int:
    """Use the kernels in the packed linear layers of `model` that they fit, in place; returns their
    number. The model is for inference from then on: `assert_frozen` refuses it."""
    count = 0
    for module in model.modules():
        if not (isinstance(module, PackedLinear) and module.is_plain):
            continue
        if module.tensor.parts.packed.device.type == "cpu":
            product = _int4_product(module) or _int8_product(module)
            if product is not None:
                module.forward = functools.partial(  # type: ignore[method-assign]
                    _forward, module, product
                )
                count += 1
    return count


def _forward(layer: PackedLinear, product: Product, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > ROWS or torch.is_grad_enabled():
        return PackedLinear.forward(layer, x)
    y = product(rows.to(torch.bfloat16)).to(x.dtype).view(*x.shape[:-1], -1)
    return y if layer.bias is None else y + layer.bias


def _int4_product(layer: PackedLinear) -> Product | None:
    """The int4 kernel with the layer's weight; None if it does not fit."""
    scheme, encoding = layer.scheme, layer.encoding
    match scheme.granularity:
        case Blocks(size):
            pass
        case PerChannel(0):
            size = layer.in_features
        case _:
            return None
    block = next((b for b in _BLOCKS if size % b == 0), None)
    if scheme.bitwidth > 4 or not block or layer.out_features % _OUTPUTS:
        return None
    # The kernel subtracts 8. With the middle code moved there, a symmetric grid has the zero 0.
    middle = -scheme.symmetric_offset
    scale = encoding.scale
    if scheme.float_offset:
        zero = encoding.minimum + middle * scale
    else:
        zero = (encoding.offset + middle) * scale
    codes = layer.codes.to(torch.int32) + (8 - middle)
    numbers = torch.stack([scale, zero], -1).view(layer.out_features, -1, 2)
    numbers = numbers.repeat_interleave(size // block, 1).transpose(0, 1)
    numbers = numbers.to(torch.bfloat16).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return lambda rows: torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, block, numbers)


def _int8_product(layer: PackedLinear) -> Product | None:
    """The int8 kernel with the layer's weight; None if it does not fit."""
    scheme = layer.scheme
    if scheme != Scheme(8, granularity=PerChannel(0)):
        return None
    codes = (layer.codes.to(torch.int16) + scheme.symmetric_offset).to(torch.int8)
    scale = layer.encoding.scale.flatten().to(torch.bfloat16)
    return lambda rows: torch.ops.aten._weight_int8pack_mm(rows, codes, scale)
