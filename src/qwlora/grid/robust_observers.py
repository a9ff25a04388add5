"""Observers that do not trust the extremes: percentile, squared error, SQNR, moving average. Streaming, one pass, mergeable.

    percentile      the narrowest range that leaves (100 - p) % of the values outside on either side
    squared error   the grid with the least  sum (x - x_hat)^2
    SQNR            the same with clipped values weighing gamma = 3 (AIMET's `post_training_tf_enhanced`)
    moving average  the bias-corrected exponential average of each batch's lowest and highest value

The first three remember the values while they are few and fine bins after that (`distribution.py`), so on up to 131,070 values they are exact.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qwlora.errors import CalibrationError
from qwlora.grid.encoding import Encoding
from qwlora.grid.lpbq import to_integer_scales
from qwlora.grid.observers import MinMaxObserver, encoding_from_range, group_range
from qwlora.grid.range_search import least_error_grid
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, PerTensor, Scheme
from qwlora.grid.value_distribution import Distribution


class DistributionObserver(MinMaxObserver):
    """Range and distribution of each group; the base of the observers that read one."""

    def __init__(self, scheme: Scheme):
        super().__init__(scheme)
        self.seen: Distribution | None = None

    def update(self, x: Float[Tensor, "*shape"]) -> None:
        """Take in the values of `x`."""
        x = x.detach()
        low, high = group_range(x, self.scheme)
        self._extend(low, high)
        magnitude = torch.maximum(-low, high).flatten().float()
        if not bool(torch.isfinite(magnitude).all()):
            return  # the range keeps it, and `encoding` refuses
        if self.seen is None:
            self.seen = Distribution(magnitude.numel(), x.device)
        self.seen.update(rows_of_groups(x, self.scheme), magnitude)

    def merge(self, other: MinMaxObserver) -> None:
        """Take in what `other` saw; equal, value for value, to having seen both streams."""
        super().merge(other)
        if not isinstance(other, DistributionObserver):
            raise CalibrationError(
                f"a {type(other).__name__} cannot be merged into a {type(self).__name__}; it kept extremes only"
            )
        if other.seen is None:
            return
        if self.seen is None:
            self.seen = Distribution(other.seen.groups, other.seen.device)
        self.seen.merge(other.seen)

    def encoding(self) -> Encoding:
        """The encoding of everything seen so far."""
        minmax = super().encoding()
        assert self.low is not None
        assert self.high is not None
        assert self.seen is not None
        return self._choose(
            self.seen, self.low.flatten().float(), self.high.flatten().float(), minmax
        )

    def _choose(self, seen: Distribution, low: Tensor, high: Tensor, minmax: Encoding) -> Encoding:
        """The encoding, from what was seen of each group, its lowest and highest value, and the encoding of these."""
        raise NotImplementedError


class PercentileObserver(DistributionObserver):
    """Leaves (100 - percentile) % of the values outside on either side; 100 is min-max.

    Raises:
        CalibrationError: the percentile is not in (50, 100].
    """

    def __init__(self, scheme: Scheme, percentile: float = 99.99):
        super().__init__(scheme)
        if not 50 < percentile <= 100:
            raise CalibrationError(f"percentile {percentile} is not in (50, 100]")
        self.percentile = percentile

    def _choose(self, seen: Distribution, low: Tensor, high: Tensor, minmax: Encoding) -> Encoding:
        first, last = seen.percentile_range(self.percentile)
        shape = minmax.scale.shape
        return encoding_from_range(
            torch.maximum(low, first).view(shape),
            torch.minimum(high, last).view(shape),
            self.scheme,
        )


class SquaredErrorObserver(DistributionObserver):
    """The grid with the least squared error, clipped values weighing `gamma`."""

    def __init__(self, scheme: Scheme, gamma: float = 1.0):
        super().__init__(scheme)
        self.gamma = gamma

    def _choose(self, seen: Distribution, low: Tensor, high: Tensor, minmax: Encoding) -> Encoding:
        shape = minmax.scale.shape
        scale, offset = (
            found.view(shape)
            for found in least_error_grid(seen, low, high, self.scheme, self.gamma)
        )
        if isinstance(self.scheme.granularity, Lpbq):
            scale = to_integer_scales(scale, self.scheme)
        return Encoding(self.scheme, scale, offset)


class SqnrObserver(SquaredErrorObserver):
    """AIMET's `post_training_tf_enhanced`: squared error in which clipping weighs three times."""

    def __init__(self, scheme: Scheme, gamma: float = 3.0):
        super().__init__(scheme, gamma)


class MovingAverageObserver(MinMaxObserver):
    """The range is an average over batches, in which a batch weighs `1 - momentum` times what the next one weighs.

        average_n = sum_i momentum (1 - momentum)^(n - i) bound_i / (1 - (1 - momentum)^n)

    `merge` takes the other stream as the later one; so merging is associative and equal to having seen one stream after the other.
    """

    def __init__(self, scheme: Scheme, momentum: float = 0.01):
        super().__init__(scheme)
        if not 0 < momentum <= 1:
            raise CalibrationError(f"momentum {momentum} is not in (0, 1]")
        self.momentum = momentum
        self.batches = 0
        self._sums: Tensor | None = None  # float64 [2, *groups], not yet divided

    def update(self, x: Float[Tensor, "*shape"]) -> None:
        """Take in one batch."""
        self._append(self.momentum * torch.stack(group_range(x.detach(), self.scheme)).double(), 1)

    def merge(self, other: MinMaxObserver) -> None:
        """Take in what `other` saw after this one."""
        self._check_scheme(other)
        if not isinstance(other, MovingAverageObserver) or other.momentum != self.momentum:
            raise CalibrationError("a moving average is merged with one of the same momentum only")
        if other._sums is not None:
            self._append(other._sums, other.batches)

    def _append(self, sums: Tensor, batches: int) -> None:
        self._check_groups(sums[0])
        self._sums = (
            sums if self._sums is None else self._sums * (1 - self.momentum) ** batches + sums
        )
        self.batches += batches
        self.low, self.high = (self._sums / (1 - (1 - self.momentum) ** self.batches)).float()


def rows_of_groups(x: Tensor, scheme: Scheme) -> Float[Tensor, "groups values"]:
    """`x` with one row for each group, in the order of the scales."""
    match scheme.granularity:
        case PerTensor():
            return x.reshape(1, -1)
        case PerChannel(axis):
            return x.movedim(axis, 0).reshape(x.shape[axis], -1)
        case PerBlock(size) | Lpbq(size):
            return x.reshape(-1, size)
