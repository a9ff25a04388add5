"""A tensor as integers: codes and the encoding that gives them values. Solvers and readers return
it, packed layers take it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from qwlora.errors import GridError
from qwlora.grid.encoding import Encoding


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """Codes with their encoding.

    Args:
        codes: from 0, uint8 up to 8 bits; `[out, in]` for a matrix (whatever way round its layer
            stores it), `[experts, out, in]` for fused experts; blocks run along the last axis.
        encoding: integer or float offsets, with scales that fit the codes.
    """

    codes: Integer[Tensor, "*shape"]
    encoding: Encoding

    def __post_init__(self) -> None:
        bitwidth = self.encoding.scheme.bitwidth
        is_signed = self.codes.dtype == torch.int8 or (
            self.codes.dtype != torch.uint8 and self.codes.numel() > 0 and int(self.codes.min()) < 0
        )
        if is_signed:
            half = 2 ** (bitwidth - 1)
            raise GridError(
                f"the codes are signed ({self.codes.dtype}), but codes run from 0 to "
                f"{2 * half - 1}: pass (codes.int() + {half}).to(torch.uint8). A code's value is "
                f"(code + offset) * scale, so a symmetric grid has offset -{half}"
            )
        expected = self.encoding.scheme.scale_shape(tuple(self.codes.shape))
        if tuple(self.encoding.scale.shape) != expected:
            raise GridError(
                f"codes of shape {list(self.codes.shape)} need scales of shape {list(expected)}, "
                f"not {list(self.encoding.scale.shape)}"
            )

    def __repr__(self) -> str:
        return f"QuantizedTensor({list(self.codes.shape)}, {self.encoding.scheme})"

    def equals(self, other: QuantizedTensor) -> bool:
        """Whether both have the same codes on the same grid."""
        return torch.equal(self.codes, other.codes) and self.encoding.equals(other.encoding)

    def dequantize(self) -> Float[Tensor, "*shape"]:
        """The values, float32."""
        return self.encoding.dequantize(self.codes)
