"""A Linear layer whose weight is packed integers.

    y = x W_hat^T + b,    W_hat = (q + offset) * scale

`W_hat` is unpacked for each forward and again for each backward; autograd keeps the codes, never the floats. The layer is a `torch.nn.Linear` to everyone who
asks, so PEFT's LoRA attaches to it unmodified. Given up: a gradient for the weight (it is frozen), and merging (a float delta has no place among the codes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qwlora.errors import MergeError
from qwlora.grid.encoding import Encoding
from qwlora.grid.operators import dequantize
from qwlora.grid.packing import pack, packed_row_bytes, unpack
from qwlora.grid.scheme import Scheme


class PackedLinear(nn.Linear):
    """Linear layer on packed codes.

    Buffers: `packed` uint8 [out, bytes], `scale` float32 of the granularity's shape, `offset` int32 likewise (asymmetric grids only: a symmetric one is fixed).
    `weight` unpacks a fresh float tensor at each access, for code that wants to look; writing through it is refused.
    """

    packed: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, bias: nn.Parameter | None = None, device: torch.device | None = None):
        nn.Module.__init__(self)  # not Linear's: no float weight is ever made
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        shape = scheme.scale_shape((out_features, in_features))
        row_bytes = packed_row_bytes(in_features, scheme.bitwidth)
        self.register_buffer("packed", torch.empty(out_features, row_bytes, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(shape, device=device))
        self.register_buffer("offset", None if scheme.symmetric else torch.empty(shape, dtype=torch.int32, device=device))
        self.register_parameter("bias", bias)

    @classmethod
    def from_codes(cls, codes: Tensor, encoding: Encoding, bias: nn.Parameter | None) -> PackedLinear:
        """Pack `codes` [out, in] with their encoding."""
        out_features, in_features = codes.shape
        layer = cls(in_features, out_features, encoding.scheme, bias, device=torch.device("meta"))
        layer.packed = pack(codes, encoding.scheme.bitwidth)
        layer.scale = encoding.scale
        layer.offset = None if encoding.scheme.symmetric else encoding.offset
        return layer

    @property
    def encoding(self) -> Encoding:
        """The frozen encoding of the weight."""
        offset = self.offset
        if offset is None:
            offset = torch.full_like(self.scale, self.scheme.symmetric_offset, dtype=torch.int32)
        return Encoding(self.scheme, self.scale, offset)

    @property
    def codes(self) -> Tensor:
        """The unpacked codes, uint8 [out, in]."""
        return unpack(self.packed, self.scheme.bitwidth, self.in_features)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """`W_hat`, unpacked at this access."""
        return self._dequantize(self.scale.dtype).as_subclass(_Unpacked)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if torch.compiler.is_exporting():
            return nn.functional.linear(x, self._dequantize(x.dtype), self.bias)
        return _PackedLinearFunction.apply(x, self.bias, self)

    def _dequantize(self, dtype: torch.dtype) -> Tensor:
        layout = self.scheme.to_json()
        return dequantize(self.packed, self.scale, self.offset, self.in_features, self.scheme.bitwidth, layout["axis"], layout["block_size"]).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)  # `model.to(bfloat16)` must not move the grid
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.scheme}"


class _PackedLinearFunction(torch.autograd.Function):
    """Saves the layer by reference: what backward needs is the codes, and they are already there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer._dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = gradient @ ctx.layer._dequantize(gradient.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


class _Unpacked(Tensor):
    """A look at the weight of a packed layer. `.data` is how a merge would write to it, and is refused: the write would be lost."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.data.__get__, Tensor.data.__set__):  # type: ignore[attr-defined]
            raise MergeError(
                "this layer's weight is packed integers: an adapter cannot be merged into it, because most of its delta is smaller than a step of the grid "
                "and would be lost. Keep the adapter separate (PeftModel.from_pretrained on the base), or merge it into a float copy of the model"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
