"""From values to an encoding: the observed range, and the search for a better one.

The range always contains zero, so that zero is exact. The scale follows AIMET (aimet-torch 2.42, `MinMaxEncodingAnalyzer`), whose numbers are thereby ours:

    asymmetric   scale = (max - min) / steps,  offset = round(min / scale)
    symmetric    scale = max(max / floor(steps / 2), -min / ceil(steps / 2)),  offset = -2^(bitwidth - 1)

with `steps = 2^bitwidth - 1`: the smallest symmetric grid that clips neither end. At 2 bits AIMET divides the positive end by 2 instead of 1 and accepts the
clipping. A range narrower than float32 can tell apart from zero gets the smallest scale, `min(eps, 0.01 / steps)`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from qwlora.errors import CalibrationError
from qwlora.grid.encoding import Encoding
from qwlora.grid.lpbq import to_integer_scales
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, PerTensor, Scheme


def encoding_from_range(
    low: Float[Tensor, "*groups"], high: Float[Tensor, "*groups"], scheme: Scheme
) -> Encoding:
    """The encoding of an observed range, one scale per entry of `low` and `high`.

    Raises:
        CalibrationError: a bound is nan or infinite, or the two are further apart than float32 can say.
    """
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise CalibrationError("the observed range is not finite (nan or infinity in the data)")
    if not bool(torch.isfinite(high.float() - low.float()).all()):
        raise CalibrationError(
            "the observed range is wider than float32 can hold; look for values that are masks or an overflow"
        )
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    steps = scheme.steps
    smallest = min(torch.finfo(torch.float32).eps, 0.01 / steps)
    narrow = smallest * ((high - low) / steps < smallest)
    if scheme.symmetric:
        positive, negative = math.floor(steps / 2), math.ceil(steps / 2)
        high, low = high + positive * narrow, low - negative * narrow
        step = torch.maximum(high / (positive if steps > 3 else 2), -low / negative)
        # AIMET stores the two ends and derives the scale from them; so is the last bit equal
        scale = (positive * step - (-negative * step)) / steps
        offset = torch.full_like(scale, scheme.symmetric_offset)
    else:
        high = high + steps * narrow
        scale = (high - low) / steps
        offset = torch.round(low / scale.clamp(min=smallest)).clamp(-steps, 0)
    scale = scale.clamp(min=smallest)
    if isinstance(scheme.granularity, Lpbq):
        scale = to_integer_scales(scale, scheme)
    return Encoding(scheme, scale, offset.to(torch.int32))


def group_range(
    x: Float[Tensor, "*shape"], scheme: Scheme
) -> tuple[Float[Tensor, "*groups"], Float[Tensor, "*groups"]]:
    """Lowest and highest value of each group of `x`.

    Raises:
        CalibrationError: `x` holds no values.
        GridError: the granularity does not fit the shape.
    """
    scheme.scale_shape(tuple(x.shape))
    if not x.numel():
        raise CalibrationError(f"a tensor of shape {list(x.shape)} holds no values to measure")
    match scheme.granularity:
        case PerTensor():
            low, high = torch.aminmax(x)
            return low, high
        case PerChannel(axis):
            return _bounds_of_rows(x.movedim(axis, 0).reshape(x.shape[axis], -1))
        case PerBlock(size) | Lpbq(size):
            return _bounds_of_rows(x.unflatten(-1, (-1, size)))


def _bounds_of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.amin(-1), x.amax(-1)  # five times faster than torch.aminmax along an axis


class MinMaxObserver:
    """Running lowest and highest value per group; one pass, a constant amount of memory, mergeable.

    Raises:
        CalibrationError: `encoding()` before any data, or after data with nan or infinity; `update` with another number of groups than before.
    """

    def __init__(self, scheme: Scheme):
        self.scheme = scheme
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Float[Tensor, "*shape"]) -> None:
        """Take in the values of `x`."""
        self._extend(*group_range(x.detach(), self.scheme))

    def merge(self, other: MinMaxObserver) -> None:
        """Take in what `other` saw; equal to having seen both streams.

        Raises:
            CalibrationError: the other observer has another scheme, or saw a tensor of another shape.
        """
        self._check_scheme(other)
        if other.low is not None and other.high is not None:
            self._extend(other.low, other.high)

    def encoding(self) -> Encoding:
        """The encoding of everything seen so far."""
        if self.low is None or self.high is None:
            raise CalibrationError("no data was observed")
        return encoding_from_range(self.low, self.high, self.scheme)

    def _extend(self, low: Tensor, high: Tensor) -> None:
        self._check_groups(low)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def _check_groups(self, low: Tensor) -> None:
        if self.low is not None and low.shape != self.low.shape:
            raise CalibrationError(
                f"{list(low.shape)} ranges were observed where there were {list(self.low.shape)} before; one observer sees one tensor"
            )

    def _check_scheme(self, other: MinMaxObserver) -> None:
        if other.scheme != self.scheme:
            raise CalibrationError(
                f"an observer of {other.scheme} cannot be merged into one of {self.scheme}"
            )


def measure(x: Float[Tensor, "*shape"], scheme: Scheme) -> Encoding:
    """The min-max encoding of one tensor."""
    return encoding_from_range(*group_range(x, scheme), scheme)


def search(
    x: Float[Tensor, "*shape"], scheme: Scheme, candidates: int = 40, narrowest: float = 0.4
) -> Encoding:
    """The range, out of `candidates` fractions of the min-max range, with the least squared error `sum (x - x_hat)^2` in each group.

    The fractions run evenly from `narrowest` to 1, and 1 is among them, so no group ends worse than with `measure`. Blocks with integer scales are searched
    without that bond; a row whose scales are then worse for it than the min-max ones takes those.
    """
    x = x.float()
    unbound = scheme
    if isinstance(scheme.granularity, Lpbq):
        unbound = replace(scheme, granularity=PerBlock(scheme.granularity.size))
    low, high = group_range(x, scheme)
    best_error = torch.full_like(low, torch.inf)
    best_low, best_high = low.clone(), high.clone()
    for fraction in torch.linspace(1.0, narrowest, candidates).tolist():
        encoding = encoding_from_range(low * fraction, high * fraction, unbound)
        error = _group_sum((encoding.fake_quantize(x) - x).square_(), scheme)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_low = torch.where(better, low * fraction, best_low)
        best_high = torch.where(better, high * fraction, best_high)
    found = encoding_from_range(best_low, best_high, scheme)
    if not isinstance(scheme.granularity, Lpbq):
        return found
    measured = encoding_from_range(low, high, scheme)
    errors = [
        _group_sum((e.fake_quantize(x) - x).square_(), scheme).sum(-1, keepdim=True)
        for e in (found, measured)
    ]
    return Encoding(
        scheme, torch.where(errors[0] <= errors[1], found.scale, measured.scale), found.offset
    )


def _group_sum(x: Tensor, scheme: Scheme) -> Tensor:
    match scheme.granularity:
        case PerTensor():
            return x.sum()
        case PerChannel(axis):
            return x.movedim(axis, 0).reshape(x.shape[axis], -1).sum(1)
        case PerBlock(size) | Lpbq(size):
            return x.unflatten(-1, (-1, size)).sum(-1)
