"""Grids with a float offset, as in GGUF's Q4_1 and similar types.

    quantize      q     = clamp(round_half_even((x - minimum) / scale), 0, 2^bitwidth - 1)
    dequantize    x_hat = q * scale + minimum

Zero need not be on the grid. An integer offset cannot replace the minimum: rounding `minimum /
scale` costs up to half a step. So this is a separate type, which code that needs an `Encoding`
cannot take by mistake: its `offset` raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from qwlora.errors import CalibrationError, GridError
from qwlora.grid.encoding import aligned, grouped
from qwlora.grid.observers import group_range
from qwlora.grid.scheme import Scheme


@dataclass(frozen=True, eq=False, repr=False)
class FloatOffsetEncoding:
    """A float-offset scheme with its numbers.

    Args:
        scheme: one with `float_offset`.
        scale: float32, shape `scheme.scale_shape(tensor.shape)`, finite and > 0.
        minimum: float32, the same shape, finite; the value of code 0.

    Raises:
        GridError: the scheme has integer offsets, the shapes differ, or a number is impossible.
    """

    scheme: Scheme
    scale: Float[Tensor, "*groups"]
    minimum: Float[Tensor, "*groups"]

    def __post_init__(self) -> None:
        if not self.scheme.float_offset:
            raise GridError(f"{self.scheme}: this grid has integer offsets; Encoding holds it")
        if self.scale.shape != self.minimum.shape:
            raise GridError(
                f"scale has shape {list(self.scale.shape)} but minimum {list(self.minimum.shape)}"
            )
        if not bool(
            (torch.isfinite(self.scale) & (self.scale > 0)).all()
            and torch.isfinite(self.minimum).all()
        ):
            raise GridError("a scale is not a finite positive number, or a minimum is not finite")

    @property
    def offset(self) -> NoReturn:
        """Raises: there is no integer offset."""
        raise GridError(
            f"{self.scheme}: the grid is scale * q + minimum with a float minimum, which has no "
            "integer offset; requantize for a format that needs one"
        )

    def __repr__(self) -> str:
        return f"FloatOffsetEncoding({self.scheme}, scale {list(self.scale.shape)})"

    def equals(self, other: object) -> bool:
        """Whether both are the same grid."""
        return (
            isinstance(other, FloatOffsetEncoding)
            and self.scheme == other.scheme
            and torch.equal(self.scale, other.scale.to(self.scale.device))
            and torch.equal(self.minimum, other.minimum.to(self.minimum.device))
        )

    def quantize(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """Codes of `x`: uint8 up to 8 bits, int32 above."""
        x_grouped, scale, minimum = self._grouped(x)
        codes = torch.div(x_grouped - minimum, scale).round_().clamp_(0, self.scheme.steps)
        if bool(codes.isnan().any()):
            raise GridError(
                f"{int(codes.isnan().sum())} of {codes.numel()} values are nan, which has no code; "
                "look for what computed them"
            )
        return codes.to(torch.uint8 if self.scheme.bitwidth <= 8 else torch.int32).view(x.shape)

    def dequantize(self, codes: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Values of `codes`, float32."""
        codes_grouped, scale, minimum = self._grouped(codes)
        return codes_grouped.to(torch.float32).mul_(scale).add_(minimum).view(codes.shape)

    def fake_quantize(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`dequantize(quantize(x))` in the type of `x`. It has no gradient: bases with such grids
        are frozen.
        """
        return self.dequantize(self.quantize(x.detach())).to(x.dtype)

    def _grouped(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        expected = self.scheme.scale_shape(tuple(x.shape))
        if tuple(self.scale.shape) != expected:
            raise GridError(
                f"a tensor of shape {list(x.shape)} needs scales of shape {list(expected)}, not "
                f"{list(self.scale.shape)}"
            )
        granularity = self.scheme.granularity
        return (
            grouped(x, granularity),
            aligned(self.scale, granularity, x.ndim),
            aligned(self.minimum, granularity, x.ndim),
        )


def measure_float_offset(x: Float[Tensor, "*shape"], scheme: Scheme) -> FloatOffsetEncoding:
    """The min-max grid: code 0 is the group's lowest value, the last code its highest.

    Raises:
        CalibrationError: `x` is empty or not finite.
    """
    low, high = (bound.float() for bound in group_range(x, scheme))
    width = high - low
    if not bool(torch.isfinite(width).all()):
        raise CalibrationError(
            "the observed range is not finite (nan or infinity in the data), or wider than float32 "
            "can hold"
        )
    smallest = min(torch.finfo(torch.float32).eps, 0.01 / scheme.steps)
    return FloatOffsetEncoding(scheme, (width / scheme.steps).clamp(min=smallest), low)
