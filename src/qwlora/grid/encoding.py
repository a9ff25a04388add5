"""The measured grid of a tensor, and the three things that one does with it.

An encoding holds one `scale` (float32, > 0) and one `offset` (integer, AIMET's sign) for each tensor, channel or block:

    quantize        q     = clamp(round_half_even(x / scale) - offset, 0, 2^bitwidth - 1)
    dequantize      x_hat = (q + offset) * scale
    fake_quantize   dequantize(quantize(x)), with the straight-through gradient: 1 where x is inside the grid, 0 where it was clamped

The division is a division and the rounding is to even, as ONNX QuantizeLinear defines them; multiplying by a reciprocal differs in the last code. Values of a
narrower type than float32 are computed in float32 and only the result is narrowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from qwlora.errors import GridError
from qwlora.grid.scheme import Granularity, PerBlock, PerChannel, PerTensor, Scheme


@dataclass(frozen=True, eq=False)
class Encoding:
    """A scheme with its numbers.

    Args:
        scheme: bitwidth, symmetry and granularity.
        scale: float32, shape `scheme.scale_shape(tensor.shape)`.
        offset: int32, the same shape; in `[-(2^bitwidth - 1), 0]`.

    Raises:
        GridError: shapes of scale and offset differ, a scale is not finite and positive, or an offset is out of range.
    """

    scheme: Scheme
    scale: Float[Tensor, "*groups"]
    offset: Int[Tensor, "*groups"]

    def __post_init__(self) -> None:
        if self.scale.shape != self.offset.shape:
            raise GridError(f"scale has shape {list(self.scale.shape)} but offset {list(self.offset.shape)}")
        usable = torch.isfinite(self.scale) & (self.scale > 0)
        if not bool(usable.all()):
            raise GridError(
                f"a scale is a finite positive number, but {int((~usable).sum())} of {usable.numel()} are not, {float(self.scale[~usable][0])} the first"
            )
        if self.offset.numel() and not -self.scheme.steps <= int(self.offset.min()) <= int(self.offset.max()) <= 0:
            raise GridError(f"an offset is outside [-{self.scheme.steps}, 0]")

    def quantize(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """Codes of `x`: uint8 up to 8 bits, int32 above; infinity gets the last code of its side.

        Raises:
            GridError: `x` holds nan, or its shape does not fit the scheme.
        """
        x_grouped, scale, offset = self._grouped(x)
        codes = torch.div(_wide(x_grouped), scale).round_().sub_(offset).clamp_(0, self.scheme.steps)
        if bool(codes.isnan().any()):
            raise GridError(f"{int(codes.isnan().sum())} of {codes.numel()} values are nan, which has no code; look for what computed them")
        return codes.to(torch.uint8 if self.scheme.bitwidth <= 8 else torch.int32).view(x.shape)

    def dequantize(self, codes: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Values of `codes`, float32."""
        x_grouped, scale, offset = self._grouped(codes)
        return x_grouped.to(torch.float32).add_(offset).mul_(scale).view(codes.shape)

    def fake_quantize(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The nearest values of the grid, in one pass, differentiable in `x`."""
        x_grouped, scale, offset = self._grouped(x)
        wide = _wide(x_grouped)
        low, high = offset.to(wide.dtype), (offset + self.scheme.steps).to(wide.dtype)
        return _FakeQuantize.apply(wide, scale, low, high).to(x.dtype).view(x.shape)

    def _grouped(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x`, scale and offset in shapes that broadcast against each other."""
        expected = self.scheme.scale_shape(tuple(x.shape))
        if tuple(self.scale.shape) != expected:
            raise GridError(f"a tensor of shape {list(x.shape)} needs scales of shape {list(expected)}, not {list(self.scale.shape)}")
        granularity = self.scheme.granularity
        return grouped(x, granularity), aligned(self.scale, granularity, x.ndim), aligned(self.offset, granularity, x.ndim)


def grouped(x: Tensor, granularity: Granularity) -> Tensor:
    """`x` with its blocks, where it has blocks, on an axis of their own."""
    return x.unflatten(-1, (-1, granularity.size)) if isinstance(granularity, PerBlock) else x


def aligned(parameter: Tensor, granularity: Granularity, ndim: int) -> Tensor:
    """A scale or offset in a shape that broadcasts against `grouped(x)`, `x` having `ndim` axes."""
    match granularity:
        case PerTensor():
            return parameter
        case PerChannel(axis):
            shape = [1] * ndim
            shape[axis] = -1
            return parameter.view(shape)
        case PerBlock():
            return parameter.unsqueeze(-1)


def _wide(x: Tensor) -> Tensor:
    """`x` in float32 if its type is narrower: the grid's arithmetic has 24 bits, an int8 code times a bfloat16 scale would not find its way back."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _FakeQuantize(torch.autograd.Function):
    """clamp(round(x / scale), low, high) * scale; saves one bit of truth per value for backward, and only if backward will come."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return torch.div(x, scale).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, scale, low, high = inputs
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            steps = torch.div(x, scale).round_()
            ctx.save_for_backward((steps >= low) & (steps <= high))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * inside, None, None, None
