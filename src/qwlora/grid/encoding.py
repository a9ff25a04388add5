"""The measured grid of a tensor: quantize, dequantize, fake-quantize.

An encoding holds one `scale` (float32, > 0) and one `offset` (integer, AIMET's sign) per tensor,
channel or block:

    quantize        q     = clamp(round_half_even(x / scale) - offset, 0, 2^bitwidth - 1)
    dequantize      x_hat = (q + offset) * scale
    fake_quantize   dequantize(quantize(x)), with the straight-through gradient: 1 where x is inside
                    the grid, 0 where it was clamped

It divides and rounds half to even, as ONNX QuantizeLinear does; multiplying by a reciprocal would
differ in the last code. Values narrower than float32 are computed in float32, and only the result
is narrowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qwlora.errors import GridError
from qwlora.grid.scheme import Granularity, Lpbq, PerBlock, PerChannel, PerTensor, Scheme

Bound = Tensor | int


@dataclass(frozen=True, eq=False, repr=False)
class Encoding:
    """A scheme with its numbers.

    Args:
        scheme: bitwidth, symmetry and granularity.
        scale: float32, shape `scheme.scale_shape(tensor.shape)`.
        offset: int32, the same shape; in `[-(2^bitwidth - 1), 0]`.

    Raises:
        GridError: shapes of scale and offset differ, a scale is not finite and positive, an offset
            is out of range, or the scheme asks for float offsets.
    """

    scheme: Scheme
    scale: Float[Tensor, "*groups"]
    offset: Int[Tensor, "*groups"]
    uniform_offset: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.scale.shape != self.offset.shape:
            raise GridError(
                f"scale has shape {list(self.scale.shape)} but offset {list(self.offset.shape)}"
            )
        usable = torch.isfinite(self.scale) & (self.scale > 0)
        if not bool(usable.all()):
            raise GridError(
                f"a scale is a finite positive number, but {int((~usable).sum())} of "
                f"{usable.numel()} are not, {float(self.scale[~usable][0])} the first"
            )
        if self.scheme.float_offset:
            raise GridError(
                f"{self.scheme}: this grid has float offsets and so no integer encoding; "
                "FloatOffsetEncoding holds it"
            )
        if not self.offset.numel():
            return
        lowest, highest = int(self.offset.min()), int(self.offset.max())
        if not -self.scheme.steps <= lowest <= highest <= 0:
            raise GridError(f"an offset is outside [-{self.scheme.steps}, 0]")
        if (
            lowest == highest
        ):  # clamping between two numbers costs half of clamping between two tensors
            object.__setattr__(self, "uniform_offset", lowest)

    def __repr__(self) -> str:
        return f"Encoding({self.scheme}, scale {list(self.scale.shape)})"

    def equals(self, other: object) -> bool:
        """Whether both are the same grid."""
        return (
            isinstance(other, Encoding)
            and self.scheme == other.scheme
            and torch.equal(self.scale, other.scale.to(self.scale.device))
            and torch.equal(self.offset, other.offset.to(self.offset.device))
        )

    def quantize(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """Codes of `x`: uint8 up to 8 bits, int32 above; infinity gets the last code of its side.

        Raises:
            GridError: `x` holds nan, or its shape does not fit the scheme.
        """
        x_grouped, scale, offset = self._grouped(x)
        codes = (
            torch.div(_wide(x_grouped), scale).round_().sub_(offset).clamp_(0, self.scheme.steps)
        )
        if bool(codes.isnan().any()):
            raise GridError(
                f"{int(codes.isnan().sum())} of {codes.numel()} values are nan, which has no code; "
                "look for what computed them"
            )
        return codes.to(torch.uint8 if self.scheme.bitwidth <= 8 else torch.int32).view(x.shape)

    def dequantize(self, codes: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Values of `codes`, float32."""
        x_grouped, scale, offset = self._grouped(codes)
        return x_grouped.to(torch.float32).add_(offset).mul_(scale).view(codes.shape)

    def fake_quantize(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The nearest values of the grid, in one pass, differentiable in `x`, and in the scale if
        it asks for a gradient.

        The scale's gradient is that of LSQ (Esser et al. 2020, https://arxiv.org/abs/1902.08153),
        without their factor for the step size: `round(x / scale) - x / scale` where x is inside the
        grid, and the number of steps of the end it was clamped to elsewhere.
        """
        x_grouped, scale, _ = self._grouped(x)
        wide = _wide(x_grouped)
        if not (torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)):
            low, high = self._bounds(x, wide.dtype)
            codes = torch.div(wide, scale).round_().clamp_(low, high)  # type: ignore[arg-type]
            return codes.mul_(scale).to(x.dtype).view(x.shape)
        return (
            _FakeQuantize.apply(wide, scale, *self._bounds(x, wide.dtype)).to(x.dtype).view(x.shape)
        )

    def fake_quantize_(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`fake_quantize` written over `x` itself, bit for bit the same; memory that is there
        already costs a fraction of memory that has to be fetched.

        Raises:
            GridError: a gradient is wanted through `x`, or `x` is expanded, so that several of its
                values lie in one place.
        """
        if torch.is_grad_enabled() and (x.requires_grad or self.scale.requires_grad):
            raise GridError(
                "fake_quantize_ writes over what a gradient would need; use fake_quantize, or "
                "torch.no_grad()"
            )
        if any(size > 1 and step == 0 for size, step in zip(x.shape, x.stride(), strict=True)):
            raise GridError(
                f"a tensor of shape {list(x.shape)} with strides {list(x.stride())} is expanded "
                "and cannot be written over; use fake_quantize"
            )
        x_grouped, scale, _ = self._grouped(x)
        if _wide(x) is not x:
            return x.copy_(self.fake_quantize(x))
        low, high = self._bounds(x, x.dtype)
        x_grouped.div_(scale).round_().clamp_(low, high).mul_(scale)  # type: ignore[arg-type]
        return x

    def _bounds(self, x: Tensor, dtype: torch.dtype) -> tuple[Bound, Bound]:
        """The lowest and highest `q + offset`, one number each if all groups have the same."""
        low: Bound = (
            self.uniform_offset
            if self.uniform_offset is not None
            else aligned(self.offset, self.scheme.granularity, x.ndim).to(dtype)
        )
        return low, low + self.scheme.steps

    def _grouped(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x`, scale and offset in shapes that broadcast against each other."""
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
            aligned(self.offset, granularity, x.ndim),
        )


def grouped(x: Tensor, granularity: Granularity) -> Tensor:
    """`x` with its blocks, where it has blocks, on an axis of their own."""
    return (
        x.unflatten(-1, (-1, granularity.size)) if isinstance(granularity, PerBlock | Lpbq) else x
    )


def aligned(parameter: Tensor, granularity: Granularity, ndim: int) -> Tensor:
    """A scale or offset in a shape that broadcasts against `grouped(x)`, `x` having `ndim` axes."""
    match granularity:
        case PerTensor():
            return parameter
        case PerChannel(axis):
            shape = [1] * ndim
            shape[axis] = -1
            return parameter.view(shape)
        case PerBlock() | Lpbq():
            return parameter.unsqueeze(-1)


def _wide(x: Tensor) -> Tensor:
    """`x` in float32 if its type is narrower: the grid's arithmetic has 24 bits, an int8 code times
    a bfloat16 scale would not find its way back.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _FakeQuantize(torch.autograd.Function):
    """clamp(round(x / scale), low, high) * scale.

    Saves one bit of truth per value for the gradient of `x`; `x` itself and the steps only if the
    scale learns.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
        steps = torch.div(x, scale).round_()
        _, scale_learns, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
        inside = (steps >= low) & (steps <= high)
        steps.clamp_(low, high)  # type: ignore[arg-type]
        ctx.save_for_backward(inside, scale, *((x, steps.clone()) if scale_learns else ()))
        return steps.mul_(scale)

    @staticmethod
    def backward(
        ctx: FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        inside, scale, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        for_x = gradient * inside if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        if not kept:
            return for_x, None, None, None
        x, steps = kept
        per_value = steps - torch.where(inside, x / scale, 0)
        return for_x, (gradient * per_value).sum_to_size(scale.shape), None, None
