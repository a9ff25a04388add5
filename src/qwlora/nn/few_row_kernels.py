"""Products of a few rows with packed weights, by torch's own integer kernels for the CPU.

    use_few_row_kernels_(model, head=model.get_output_embeddings())
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

For few rows, an output head whose grid fits no kernel, or that has none, is rounded to symmetric
rows of 8 bits: a copy of one byte per weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from qwlora.grid.encoding import QuantizedTensor, measure
from qwlora.grid.scheme import Blocks, PerChannel, Scheme
from qwlora.nn.packed_layer import PackedLinear, instance_calls

ROWS, EXACT = 16, 64
_BLOCKS = (256, 128, 64, 32)  # what the int4 kernel supports
# torch 2.13 refuses another multiple: the kernel computes this many outputs at once
_OUTPUTS = 16
_INT8 = Scheme(8, granularity=PerChannel(0))  # what the int8 kernel supports
_ROUNDED_AT_ONCE = 4096  # rows of a head, so that few of its floats are in memory twice

Product = Callable[[Tensor], Tensor]  # bfloat16 [rows, in] -> [rows, out]


def use_few_row_kernels_(model: nn.Module, head: nn.Module | None = None) -> int:
    """Use the kernels in the packed linear layers of `model` that they fit, and in its output head
    unless an adapter or another module wraps it, in place; returns their number. The model is for
    inference from then on: `assert_frozen` refuses it."""
    count = 0
    for layer in model.modules():
        if not (isinstance(layer, PackedLinear) and layer.is_plain):
            continue
        if layer.tensor.parts.packed.device.type != "cpu":
            continue
        product = _int4_product(layer)
        if product is None and layer.scheme == _INT8:
            product = _int8_kernel([layer.quantized])
        if product is not None:
            layer.few_rows = partial(_few_rows, layer, product)
        elif layer is head:
            layer.few_rows = partial(_logits, layer, _rounded_product(layer))
        count += layer.few_rows is not None
    # a float output head has more bytes than all other weights of a small model
    if type(head) is nn.Linear and head.weight.device.type == "cpu" and not instance_calls(head):
        # a copy of the model copies a partial with its head, but would share a closure
        logits = partial(_logits, head, _rounded_product(head))
        head.forward = partial(_forward, head, logits)  # type: ignore[method-assign]
        count += 1
    return count


def _few_rows(layer: nn.Linear, product: Product, x: Tensor) -> Tensor | None:
    """The output of `layer`; None for 0 or more than ROWS rows, if gradients may be needed, and for
    inputs that torch refuses."""
    dtype = layer.compute_dtype if isinstance(layer, PackedLinear) else layer.weight.dtype
    fits = isinstance(x, Tensor) and x.dtype == dtype and x.shape[-1:] == (layer.in_features,)
    if not (fits and 0 < x.numel() <= ROWS * x.shape[-1]) or torch.is_grad_enabled():
        return None
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    y = product(rows).to(x.dtype).view(*x.shape[:-1], -1)
    return y if layer.bias is None else y + layer.bias


def _logits(head: nn.Linear, product: Product, x: Tensor) -> Tensor | None:
    y = _few_rows(head, product, x)
    if y is None:
        return None
    # Rounding moves logits by about 1 %. The largest are computed again from the head's own rows,
    # so that the likeliest token is the exact head's.
    top = y.topk(min(EXACT, y.shape[-1])).indices
    exact = (_rows(head, top, x.dtype) @ x.unsqueeze(-1)).squeeze(-1)
    return y.scatter(-1, top, exact if head.bias is None else exact + head.bias[top])


def _rows(layer: nn.Linear, index: Tensor | slice, dtype: torch.dtype = torch.float32) -> Tensor:
    if isinstance(layer, PackedLinear):
        return layer.tensor.dequantize(dtype, index)
    return layer.weight[index].detach()


def _forward(head: nn.Linear, logits: Callable[[Tensor], Tensor | None], x: Tensor) -> Tensor:
    y = logits(x)
    return nn.Linear.forward(head, x) if y is None else y


def _int4_product(layer: PackedLinear) -> Product | None:
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
    # the sum of integers is exact; minimum + middle * scale would round twice more
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


def _rounded_product(layer: nn.Linear) -> Product:
    parts = []
    for start in range(0, layer.out_features, _ROUNDED_AT_ONCE):
        weight = _rows(layer, slice(start, start + _ROUNDED_AT_ONCE))
        encoding = measure(weight.float(), _INT8)
        parts.append(QuantizedTensor(encoding.quantize(weight), encoding))
    return _int8_kernel(parts)


def _int8_kernel(parts: list[QuantizedTensor]) -> Product:
    codes = torch.cat([part.signed_codes for part in parts])
    scale = torch.cat([part.encoding.scale for part in parts]).to(torch.bfloat16)
    return lambda rows: torch.ops.aten._weight_int8pack_mm(rows, codes, scale)
