"""The packed layers of torch's own classes.

    PackedLinear       y = x W_hat^T + b
    PackedEmbedding    only the rows that are looked up are unpacked
    PackedConv1d, 2d   the weight as [out, in * kernel], blocks along that row

For a subclass of one of these, `packed_class` generates a class with the subclass first: its
forward is kept, and where it calls its parent's forward, it calls these.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from qwlora.grid.encoding import Encoding
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.nn.custom_ops import dequantize, gather, linear
from qwlora.nn.packed_layer import PackedLayer, traced
from qwlora.nn.packed_matmul import LinearAddFunction, LinearFunction
from qwlora.nn.packed_tensor import PackedTensor


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override] # the weight is a property
    """Linear layer on packed codes [out, in]."""

    @classmethod
    def from_codes(
        cls, codes: Tensor, encoding: Encoding, bias: nn.Parameter | None
    ) -> PackedLinear:
        """Pack `codes` [out, in] with their encoding."""
        dtype = torch.float32 if bias is None else bias.dtype
        tensor = PackedTensor.from_quantized(QuantizedTensor(codes, encoding))
        rows, columns = codes.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
        linear.register_parameter("bias", bias)
        return cls.from_layer(linear, tensor)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if torch.compiler.is_exporting():
            return nn.functional.linear(x, dequantize(*self.operands).to(x.dtype), self.bias)
        if traced():
            y = linear(x, *self.operands)
            return y if self.bias is None else y + self.bias
        return LinearFunction.apply(x, self.bias, self.packed_weight)

    def add_to(
        self, y: Float[Tensor, "*batch out"], x: Float[Tensor, "*batch in"]
    ) -> Float[Tensor, "*batch out"]:
        """y += x W_hat^T + b, in place."""
        return LinearAddFunction.apply(y, x, self.bias, self.packed_weight)

    @property
    def is_plain(self) -> bool:
        """Whether a call computes only the product: no subclass overrides forward, and no hook
        runs.
        """
        return (
            type(self).forward is PackedLinear.forward
            and "forward" not in self.__dict__
            and not (self._forward_hooks or self._forward_pre_hooks)
        )


class PackedEmbedding(PackedLayer, nn.Embedding):  # type: ignore[override] # weight: a property
    """Embedding on packed codes [rows, width]."""

    def forward(self, index: Integer[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        if torch.compiler.is_exporting():
            return nn.functional.embedding(
                index, dequantize(*self.operands).to(self.compute_dtype), self.padding_idx
            )
        if traced():
            return gather(index, *self.operands).to(self.compute_dtype)
        return self.tensor.dequantize(self.compute_dtype, index)


class _PackedConv(PackedLayer):
    """Convolution on packed codes [out, in / groups * kernel]."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # PEFT builds a LoRA's convolutions by `type(base_layer)(...)`
        plain = nn.Conv1d if issubclass(cls, nn.Conv1d) else nn.Conv2d
        return plain(*args, **kwargs) if args or kwargs else super().__new__(cls)


class PackedConv1d(_PackedConv, nn.Conv1d):  # type: ignore[override] # the weight is a property
    """Packed Conv1d."""


class PackedConv2d(_PackedConv, nn.Conv2d):  # type: ignore[override] # the weight is a property
    """Packed Conv2d."""


KINDS: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    nn.Embedding: PackedEmbedding,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
}


def packed_class(kind: type[nn.Module]) -> type[PackedLayer] | None:
    """The packed class of modules of class `kind`; None if there is none."""
    if kind not in KINDS:
        parent = next((packed for plain, packed in KINDS.items() if issubclass(kind, plain)), None)
        if parent is None:
            return None
        KINDS[kind] = type(f"Packed{kind.__name__}", (kind, parent), {})
    return KINDS[kind]
