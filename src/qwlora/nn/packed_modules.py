"""The packed layers of torch's own classes.

    PackedLinear       y = x W_hat^T + b
    PackedEmbedding    the rows that are looked up, and no others, unpacked
    PackedConv1d, 2d   the weight as [out, in * kernel], blocks along that row

`packed_class` makes the class for a subclass of any of these, with the subclass first: its own forward stands, and where it calls its parent's, it calls these.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from qwlora.grid.encoding import Encoding
from qwlora.grid.float_offset import FloatOffsetEncoding
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.nn.custom_ops import dequantize, gather, linear
from qwlora.nn.packed_layer import PackedLayer, traced
from qwlora.nn.packed_matmul import AddedProduct, Product
from qwlora.nn.packed_tensor import PackedTensor


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override] # a look is all that there is of the weight
    """Linear layer on packed codes [out, in]."""

    was_conv1d = (
        False  # whether it stands in the place of a GPT-2 Conv1D, whose weight is [in, out]
    )

    @classmethod
    def from_codes(
        cls, codes: Tensor, encoding: Encoding | FloatOffsetEncoding, bias: nn.Parameter | None
    ) -> PackedLinear:
        """Pack `codes` [out, in] with their encoding."""
        return cls.build(
            PackedTensor.from_quantized(QuantizedTensor(codes, encoding)),
            None,
            bias,
            torch.float32 if bias is None else bias.dtype,
        )

    @classmethod
    def build(
        cls,
        tensor: PackedTensor | None,
        owner: PackedLayer | None,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
    ) -> PackedLinear:
        """A layer on `tensor`, or tied to `owner`."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)  # not Linear's: no float weight is ever made
        shape = (tensor or owner.tensor).shape  # type: ignore[union-attr]
        layer.out_features, layer.in_features = shape
        layer.register_parameter("bias", bias)
        return layer._take(tensor, owner, shape, dtype)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if torch.compiler.is_exporting():
            return nn.functional.linear(x, dequantize(*self.operands).to(x.dtype), self.bias)
        if traced():
            y = linear(x, *self.operands)
            return y if self.bias is None else y + self.bias
        return Product.apply(x, self.bias, self.part)

    def add_to(
        self, y: Float[Tensor, "*batch out"], x: Float[Tensor, "*batch in"]
    ) -> Float[Tensor, "*batch out"]:
        """y + x W_hat^T + b, in the memory of y (see `AddedProduct`)."""
        return AddedProduct.apply(y, x, self.bias, self.part)

    @property
    def is_plain(self) -> bool:
        """Whether a call computes the product and nothing else: no subclass has another forward, and no hook sees it."""
        return (
            type(self).forward is PackedLinear.forward
            and "forward" not in self.__dict__
            and not (self._forward_hooks or self._forward_pre_hooks)
        )


class PackedEmbedding(PackedLayer, nn.Embedding):  # type: ignore[override] # a look is all that there is of the weight
    """Embedding on packed codes [rows, width]."""

    def forward(self, index: Integer[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        if torch.compiler.is_exporting():
            return nn.functional.embedding(
                index, dequantize(*self.operands).to(self.compute_dtype), self.padding_idx
            )
        if traced():
            return gather(index, *self.operands).to(self.compute_dtype)
        return self.tensor.dequantize(self.compute_dtype, index)


class PackedConv1d(PackedLayer, nn.Conv1d):  # type: ignore[override] # a look is all that there is of the weight
    """Convolution on packed codes [out, in / groups * kernel]."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return (
            nn.Conv1d(*args, **kwargs) if args or kwargs else super().__new__(cls)
        )  # PEFT builds a LoRA's convolutions by `type(base_layer)(...)`


class PackedConv2d(PackedLayer, nn.Conv2d):  # type: ignore[override] # a look is all that there is of the weight
    """Convolution on packed codes [out, in / groups * height * width]."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return nn.Conv2d(*args, **kwargs) if args or kwargs else super().__new__(cls)


KINDS: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    nn.Embedding: PackedEmbedding,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
}


@cache
def _made(kind: Any, parent: Any) -> type[PackedLayer]:
    return type(f"Packed{kind.__name__}", (kind, parent), {})


def packed_class(kind: type[nn.Module]) -> type[PackedLayer] | None:
    """The packed class of modules of class `kind`; None if there is none."""
    if kind in KINDS:
        return KINDS[kind]
    parent = next((packed for plain, packed in KINDS.items() if issubclass(kind, plain)), None)
    made: Any = _made  # mypy takes classes for unhashable
    return None if parent is None else made(kind, parent)
