"""The measured grid of a tensor: quantize, dequantize, fake-quantize, and its min-max range.

An encoding holds one `scale` (float32, > 0; in signed blocks of either sign) and one `offset`
(integer, AIMET's sign) per tensor, channel or block:

    quantize        q     = clamp(round_half_even(x / scale) - offset, 0, 2^bitwidth - 1)
    dequantize      x_hat = (q + offset) * scale

or, for a float-offset scheme (such as GGUF's Q4_1), one `minimum` (float32):

    quantize        q     = clamp(round_half_even((x - minimum) / scale), 0, 2^bitwidth - 1)
    dequantize      x_hat = q * scale + minimum

There, zero need not be on the grid, and `offset` raises.

    fake_quantize   dequantize(quantize(x)), with the straight-through gradient: 1 where x is inside
                    the grid, 0 where it was clamped; scales get no gradient

It divides and rounds half to even, as ONNX QuantizeLinear does. Values narrower than float32 are
computed in float32, and only the result is narrowed.

The encoding of a min-max range, which always contains zero. The scale is AIMET's, bit for bit
(aimet-torch 2.42, `MinMaxEncodingAnalyzer`):

    asymmetric   scale = (max - min) / steps,  offset = round(min / scale)
    symmetric    scale = max(max / floor(steps / 2), -min / ceil(steps / 2)),
                 offset = -2^(bitwidth - 1)

with `steps = 2^bitwidth - 1`. The symmetric grid clips nothing, except at 2 bits, where max is
divided by 2, as in AIMET. A range that float32 cannot tell from zero gets the smallest scale,
`min(eps, 0.01 / steps)`. The range of a float-offset grid need not contain zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int, Integer, Shaped
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qwlora.errors import CalibrationError, GridError
from qwlora.grid.scheme import Blocks, Granularity, PerBlock, PerChannel, PerTensor, Scheme

Bound = Tensor | int


@dataclass(frozen=True, eq=False, repr=False)
class Encoding:
    """A measured grid: a scheme with its scales and offsets, `x_hat = (q + offset) * scale`.

    Args:
        scheme: bitwidth, symmetry and granularity.
        scale: float32, shape `scheme.scale_shape(tensor.shape)`.
        low_end: same shape as `scale`. The integer offset (int32, `[-(2^bitwidth - 1), 0]`). For
            a float-offset scheme, the minimum (float32): the value of code 0.
    """

    scheme: Scheme
    scale: Float[Tensor, "*groups"]
    low_end: Shaped[Tensor, "*groups"]
    uniform_offset: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        kind = "minimum" if self.scheme.float_offset else "offset"
        if self.scale.shape != self.low_end.shape:
            raise GridError(
                f"scale has shape {list(self.scale.shape)} but {kind} {list(self.low_end.shape)}"
            )
        is_signed = self.scheme.granularity.is_signed
        usable = torch.isfinite(self.scale) & ((self.scale.abs() if is_signed else self.scale) > 0)
        if not bool(usable.all()):
            raise GridError(
                f"a scale is a finite {'' if is_signed else 'positive '}number"
                f"{' other than 0' if is_signed else ''}, but {int((~usable).sum())} of "
                f"{usable.numel()} are not, {float(self.scale[~usable][0])} the first"
            )
        if self.low_end.is_floating_point() != self.scheme.float_offset:
            raise GridError(f"{self.scheme}: its {kind} has another type than {self.low_end.dtype}")
        if self.scheme.float_offset and not bool(torch.isfinite(self.low_end).all()):
            raise GridError("a minimum is not finite")
        if self.scheme.float_offset or not self.low_end.numel():
            return
        lowest, highest = int(self.low_end.min()), int(self.low_end.max())
        if not -self.scheme.steps <= lowest <= highest <= 0:
            raise GridError(f"an offset is outside [-{self.scheme.steps}, 0]")
        # clamping between numbers costs half of clamping between tensors
        if lowest == highest:
            object.__setattr__(self, "uniform_offset", lowest)

    def to(self, device: torch.device) -> Encoding:
        """The encoding on a device; unchanged for the meta device, which has no values to check.

        A per-tensor scale must move too: CUDA accepts it on the CPU, but then multiplies by its
        reciprocal instead of dividing.
        """
        if device.type == "meta" or self.scale.device == device:
            return self
        # A per-tensor scale must move too: CUDA accepts it on the CPU, but then multiplies by its
        # reciprocal instead of dividing.
        return replace(self, scale=self.scale.to(device), low_end=self.low_end.to(device))

    @property
    def offset(self) -> Int[Tensor, "*groups"]:
        """The offsets."""
        # rounding minimum / scale to an integer would cost up to half a step
        if self.scheme.float_offset:
            raise GridError(
                f"{self.scheme}: the grid is scale * q + minimum with a float minimum, which has "
                "no integer offset; requantize for a format that needs one"
            )
        return self.low_end

    @property
    def minimum(self) -> Float[Tensor, "*groups"]:
        """The values of code 0."""
        return self.low_end if self.scheme.float_offset else self.low_end * self.scale

    @property
    def fits_float16(self) -> bool:
        """Whether float16 holds every scale, and every float minimum, exactly."""
        numbers = (self.scale, self.low_end) if self.scheme.float_offset else (self.scale,)
        return all(torch.equal(values.half().float(), values.float()) for values in numbers)

    def __repr__(self) -> str:
        return f"Encoding({self.scheme}, scale {list(self.scale.shape)})"

    def equals(self, other: Encoding | None) -> bool:
        """Whether both are the same grid."""
        return (
            other is not None
            and self.scheme == other.scheme
            and torch.equal(self.scale, other.scale.to(self.scale.device))
            and torch.equal(self.low_end, other.low_end.to(self.low_end.device))
        )

    def quantize(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """Codes of `x`: uint8 up to 8 bits, int32 above; infinity gets the last code of its
        side."""
        x_grouped, scale, low_end = self._grouped(x)
        if self.scheme.float_offset:
            codes = torch.div(_wide(x_grouped) - low_end, scale).round_()
        else:
            codes = torch.div(_wide(x_grouped), scale).round_().sub_(low_end)
        codes.clamp_(0, self.scheme.steps)
        # clamp keeps nan, and the cast below would make it any integer, without a word
        if bool(codes.isnan().any()):
            raise GridError(
                f"{int(codes.isnan().sum())} of {codes.numel()} values are nan, which no code can "
                "represent; find the step that computed them"
            )
        return codes.to(torch.uint8 if self.scheme.bitwidth <= 8 else torch.int32).view(x.shape)

    def dequantize(self, codes: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Values of `codes`, float32."""
        x_grouped, scale, low_end = self._grouped(codes)
        values = x_grouped.to(torch.float32)
        if self.scheme.float_offset:
            return values.mul_(scale).add_(low_end).view(codes.shape)
        return values.add_(low_end).mul_(scale).view(codes.shape)

    def fake_quantize(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The nearest values of the grid, differentiable in `x` if the offset is an integer."""
        # only bases have grids with a float minimum, and these are frozen: no gradient is needed
        if self.scheme.float_offset:
            return self.dequantize(self.quantize(x.detach())).to(x.dtype)
        x_grouped, scale, _ = self._grouped(x)
        wide = _wide(x_grouped)
        bounds = self._bounds(x, wide.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            return _FakeQuantize.apply(wide, scale, *bounds).to(x.dtype).view(x.shape)
        codes = torch.div(wide, scale).round_().clamp_(*bounds)  # type: ignore[arg-type]
        return codes.mul_(scale).to(x.dtype).view(x.shape)

    def fake_quantize_(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`fake_quantize` written over `x` itself, bit for bit the same; `x` must not be expanded
        or need a gradient."""
        # fresh memory dominates: 512 x 576 take 0.47 ms, in place 0.075 (docs/log/simulation.md)
        is_expanded = any(
            size > 1 and step == 0 for size, step in zip(x.shape, x.stride(), strict=True)
        )
        if is_expanded or (torch.is_grad_enabled() and x.requires_grad):
            raise GridError(
                "fake_quantize_ writes over its input: it must not be expanded or need a gradient"
            )
        x_grouped, scale, _ = self._grouped(x)
        if self.scheme.float_offset or _wide(x) is not x:
            return x.copy_(self.fake_quantize(x))
        bounds = self._bounds(x, x.dtype)
        x_grouped.div_(scale).round_().clamp_(*bounds).mul_(scale)  # type: ignore[arg-type]
        return x

    def _bounds(self, x: Tensor, dtype: torch.dtype) -> tuple[Bound, Bound]:
        """The lowest and highest `q + offset`, one number each if all groups have the same."""
        low: Bound | None = self.uniform_offset
        if low is None:
            low = aligned(self.offset, self.scheme.granularity, x.ndim).to(dtype)
        return low, low + self.scheme.steps

    def with_positive_scales(self) -> Encoding:
        """The same values for formats without negative scales. Signed blocks become asymmetric
        ones; the codes of a block with a negative scale are counted from the other end:

            (q + offset) s = (2^b - 1 - q + offset') |s|,  offset' = -(2^b - 1) - offset
        """
        granularity = self.scheme.granularity
        if not isinstance(granularity, Blocks) or not granularity.is_signed:
            return self
        # (q + offset) s = (2^b - 1 - q + offset') |s|,  offset' = -(2^b - 1) - offset
        turned = -self.scheme.steps - self.offset
        offset = torch.where(self.scale < 0, turned, self.offset)
        scheme = Scheme(self.scheme.bitwidth, False, PerBlock(granularity.size))
        return Encoding(scheme, self.scale.abs(), offset)

    def has_same_grid(self, other: Encoding) -> bool:
        """Whether both grids have the same values."""

        # an encodings file keeps neither the kind of blocks, nor the end that codes count from
        def plain(encoding: Encoding) -> Encoding:
            encoding = encoding.with_positive_scales()
            scheme, granularity = encoding.scheme, encoding.scheme.granularity
            if isinstance(granularity, Blocks):
                scheme = replace(scheme, granularity=PerBlock(granularity.size))
            return replace(encoding, scheme=scheme)

        return plain(self).equals(plain(other))

    def check_fit(self, x: Tensor) -> None:
        """Refuse a tensor (of values, or of codes) that needs another number of scales."""
        expected = self.scheme.scale_shape(tuple(x.shape))
        if tuple(self.scale.shape) != expected:
            raise GridError(
                f"a tensor of shape {list(x.shape)} needs scales of shape {list(expected)}, not "
                f"{list(self.scale.shape)}"
            )

    def _grouped(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x`, scale and low end in shapes that broadcast against each other."""
        self.check_fit(x)
        granularity = self.scheme.granularity
        scale, low_end = (aligned(p, granularity, x.ndim) for p in (self.scale, self.low_end))
        return grouped(x, granularity), scale, low_end


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A tensor as integers: codes and their encoding. Solvers and readers return it, packed layers
    take it.

    Args:
        codes: integers from 0, uint8 up to 8 bits; `[out, in]` for a matrix (also of a Conv1D),
            `[experts, out, in]` for fused experts; blocks run along the last axis.
        encoding: integer or float offsets, with scales that fit the codes.
    """

    codes: Integer[Tensor, "*shape"]
    encoding: Encoding

    def __post_init__(self) -> None:
        # Packing would keep the low bits of signed codes: other values, without a word.
        is_signed = self.codes.dtype == torch.int8 or (
            self.codes.dtype != torch.uint8 and self.codes.numel() > 0 and int(self.codes.min()) < 0
        )
        if is_signed:
            half = 2 ** (self.encoding.scheme.bitwidth - 1)
            raise GridError(
                f"the codes are signed ({self.codes.dtype}), but codes run from 0 to "
                f"{2 * half - 1}: pass (codes.int() + {half}).to(torch.uint8). A code's value is "
                f"(code + offset) * scale, so a symmetric grid has offset -{half}"
            )
        self.encoding.check_fit(self.codes)

    def __repr__(self) -> str:
        return f"QuantizedTensor({list(self.codes.shape)}, {self.encoding.scheme})"

    @property
    def signed_codes(self) -> Integer[Tensor, "*shape"]:
        """Codes around 0, int8, of a symmetric grid of at most 8 bits."""
        return (self.codes.to(torch.int16) + self.encoding.scheme.symmetric_offset).to(torch.int8)

    def to(self, device: torch.device) -> QuantizedTensor:
        """The tensor on a device."""
        return QuantizedTensor(self.codes.to(device), self.encoding.to(device))

    def equals(self, other: QuantizedTensor) -> bool:
        """Whether both have the same codes on the same grid."""
        return torch.equal(self.codes, other.codes) and self.encoding.equals(other.encoding)

    def dequantize(self) -> Float[Tensor, "*shape"]:
        """The values, float32."""
        return self.encoding.dequantize(self.codes)


def grouped(x: Tensor, granularity: Granularity) -> Tensor:
    """`x` with its blocks, where it has blocks, on an axis of their own."""
    return x.unflatten(-1, (-1, granularity.size)) if isinstance(granularity, Blocks) else x


def aligned(parameter: Tensor, granularity: Granularity, ndim: int) -> Tensor:
    """A scale or offset in a shape that broadcasts against `grouped(x)`, `x` having `ndim` axes."""
    match granularity:
        case PerTensor():
            return parameter
        case PerChannel(axis):
            shape = [1] * ndim
            shape[axis] = -1
            return parameter.view(shape)
        case Blocks():
            return parameter.unsqueeze(-1)


def spread(
    parameter: Tensor, granularity: Granularity, shape: tuple[int, ...], size: int
) -> Tensor:
    """A scale or offset for every `size` neighbors in a row of a matrix: [out, in / size]; `size`
    divides the blocks of `granularity` if it has any."""
    if isinstance(granularity, Blocks):
        return parameter.repeat_interleave(granularity.size // size, dim=-1)
    return aligned(parameter, granularity, 2).expand(shape[0], shape[1] // size)


def _wide(x: Tensor) -> Tensor:
    # in bfloat16, an int8 code times a scale would not round back to the same code
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
        steps = torch.div(x, scale).round_()
        # autograd keeps a boolean for each value, not the value
        ctx.save_for_backward((steps >= low) & (steps <= high))
        return steps.clamp_(low, high).mul_(scale)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * inside, None, None, None


def sqnr_db(signal: float, noise: float) -> float:
    """`10 log10(signal / noise)` of two sums of squares: infinite without noise, minus infinite
    without signal, NaN if one of them is NaN or infinite."""
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if not noise:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio else -math.inf


def _divided(x: Tensor, number: int) -> Tensor:
    # CUDA and XPU multiply by the reciprocal of a number, and divide by a tensor as the CPU does
    return x / torch.full_like(x, number)


def encoding_from_range(
    low: Float[Tensor, "*groups"], high: Float[Tensor, "*groups"], scheme: Scheme
) -> Encoding:
    """The encoding of a range, one scale per entry of `low` and `high`."""
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise CalibrationError("the observed range is not finite (nan or infinity in the data)")
    if not bool(torch.isfinite(high.float() - low.float()).all()):
        raise CalibrationError(
            "the observed range is wider than float32 can hold; look for masks or an overflow"
        )
    steps, smallest = scheme.steps, smallest_scale(scheme)
    if scheme.float_offset:
        low = low.float()
        scale = _divided(high.float() - low, steps).clamp(min=smallest)
        return Encoding(scheme, scheme.granularity.nearest(scale), low)
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    is_signed = scheme.granularity.is_signed
    turned = high > -low if is_signed else torch.zeros_like(low, dtype=torch.bool)
    low, high = torch.where(turned, -high, low), torch.where(turned, -low, high)
    narrow = smallest * (_divided(high - low, steps) < smallest)
    if scheme.symmetric:
        positive, negative = math.floor(steps / 2), math.ceil(steps / 2)
        high, low = high + positive * narrow, low - negative * narrow
        # at 2 bits AIMET divides by 2, not by floor(3 / 2), and clips there (docs/log/grid.md)
        upper = _divided(high, positive if steps > 3 else 2)
        step = torch.maximum(upper, _divided(-low, negative))
        # AIMET stores the two ends and derives the scale from them. So the last bit is equal.
        scale = _divided(positive * step - (-negative * step), steps)
        offset = torch.full_like(scale, scheme.symmetric_offset)
    else:
        high = high + steps * narrow
        scale = _divided(high - low, steps)
        offset = torch.round(low / scale.clamp(min=smallest)).clamp(-steps, 0)
    scale = scheme.granularity.nearest(scale.clamp(min=smallest))
    return Encoding(scheme, torch.where(turned, -scale, scale), offset.to(torch.int32))


def smallest_scale(scheme: Scheme) -> float:
    """The scale of a range that float32 cannot tell from zero."""
    return min(torch.finfo(torch.float32).eps, 0.01 / scheme.steps)


def group_range(
    x: Float[Tensor, "*shape"], scheme: Scheme
) -> tuple[Float[Tensor, "*groups"], Float[Tensor, "*groups"]]:
    """Lowest and highest value of each group of `x`."""
    shape = scheme.scale_shape(tuple(x.shape))
    if not x.numel():
        raise CalibrationError(f"a tensor of shape {list(x.shape)} holds no values to measure")
    if isinstance(scheme.granularity, PerTensor):
        low, high = torch.aminmax(x)
        return low, high
    rows = rows_of_groups(x, scheme)
    # five times faster than torch.aminmax along an axis
    return rows.amin(-1).view(shape), rows.amax(-1).view(shape)


def rows_of_groups(x: Tensor, scheme: Scheme) -> Float[Tensor, "groups values"]:
    """`x` with one row per group, in the order of the scales."""
    match scheme.granularity:
        case PerTensor():
            return x.reshape(1, -1)
        case PerChannel(axis):
            return x.movedim(axis, 0).reshape(x.shape[axis], -1)
        case Blocks(size):
            return x.reshape(-1, size)


def measure(x: Float[Tensor, "*shape"], scheme: Scheme) -> Encoding:
    """The min-max encoding of one tensor."""
    return encoding_from_range(*group_range(x, scheme), scheme)
