"""The range of an activation: the statistics that calibration keeps, and the grid chosen from them.

Calibration keeps the exact lowest and highest value, and a histogram of all values:

    bins       one for each bfloat16 number; a value goes into the bin of the nearest
    patterns   int32 [used bins]    the bits of that number
    counts     int64 [used bins]

Observers merge by addition, so neither the order of batches nor the number of processes changes a
bit. Ranges are estimated for many activations at a time:

    min-max                             the lowest and the highest value, exactly
    percentile, squared-error, sqnr     on the histogram, between these

`squared-error` and `sqnr` choose the grid with the least weighted squared error:

    error(scale, offset) = sum over values of  w (x - x_hat)^2 (gamma if x is clipped else 1)

The candidates are first those of AIMET's `SqnrEncodingAnalyzer`: every hundredth of the symmetric
scale; sixteenths of the asymmetric one with twenty offsets, each cut to the observed range. Then
21 scales (and up to 9 offsets) around the best of them.

With at most 31 steps the error is computed exactly. With `b_j` the middles between neighboring
steps and v the last step,

    sum (x - x_hat)^2 = sum (x - v)^2 - 2 scale sum over j of G(b_j),
    G(b) = sum over x < b of (b - x)

where G is read from running sums: one lookup per step, not one per value. With more steps the error
is modeled: a value within half a step of zero is lost entirely, and every other value has the mean
squared rounding error, scale^2 / 12.

    error = gamma * (error of clipped values) + sum over |x| < scale / 2 of x^2
          + (weight of the others) * scale^2 / 12
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qwlora.errors import CalibrationError
from qwlora.grid.encoding import smallest_scale
from qwlora.grid.scheme import RangeEstimator, Scheme
from qwlora.system.device import moved

# Bfloat16 has the exponents of float32 and 8 bits of precision, so a value moves by at most 2^-8 of
# itself, whatever its magnitude: no range is guessed, and no value is left out.
_BINS = 2**16
# The bits of this many values fit a processor's cache: 25 M at once take 4 times longer.
_VALUES_AT_ONCE = 2**18
_OBSERVERS_AT_ONCE = 16  # more are not faster, and need more memory
# The exact error takes a lookup for each step of each candidate, so it is for grids up to 5 bits.
_MOST_EXACT_STEPS = 31
# Lookups per chunk: fits a processor's cache and stays below the size that torch parallelizes.
_LOOKUPS_AT_ONCE = 2**15

Candidates = Float[Tensor, "groups candidates"]


class RangeObserver:
    """Lowest and highest value and histogram of one activation.

    Args:
        has_histogram: whether to count values; min-max does not need it.

    Attributes:
        batches: how many were observed.
        low, high: the lowest and the highest value, [] float32; None without data.
    """

    def __init__(self, has_histogram: bool):
        self.has_histogram = has_histogram
        self.batches = 0
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.patterns = torch.empty(0, dtype=torch.int32)
        self.counts = torch.empty(0, dtype=torch.int64)

    def update(self, x: Float[Tensor, "*shape"]) -> None:
        """Observe the values of `x`; an empty tensor is not a batch."""
        if not x.numel():
            return
        x, counts = x.detach(), None
        if self.has_histogram:
            counts = torch.zeros(_BINS, dtype=torch.int64, device=x.device)
            for part in x.flatten().split(_VALUES_AT_ONCE):
                # rounding to nearest keeps 0, 1 and bfloat16 values exact (docs/log/grid.md)
                bits = part.to(torch.bfloat16).view(torch.int16).to(torch.int32)
                # int16 is signed: the mask makes an index of the pattern of a negative value
                counts += torch.bincount(bits.bitwise_and_(_BINS - 1), minlength=_BINS)
        # two passes, faster than torch.aminmax
        self._add(1, x.amin().float(), x.amax().float(), counts)

    def merge(self, other: RangeObserver) -> None:
        """Add what `other` observed."""
        if other.low is None or other.high is None:
            return
        counts = None
        if self.has_histogram:
            if not other.has_histogram:
                raise CalibrationError(
                    "cannot merge an observer without a histogram into one that needs it; use the "
                    "same observers on both sides"
                )
            counts = other.counts.new_zeros(_BINS)
            counts[other.patterns] = other.counts
        self._add(other.batches, other.low, other.high, counts)

    def to(self, device: torch.device) -> RangeObserver:
        """A copy of the observer on `device`."""
        observer = RangeObserver(self.has_histogram)
        vars(observer).update(moved(vars(self), device))
        return observer

    @property
    def points(self) -> tuple[Float[Tensor, " bins"], Int64[Tensor, " bins"]]:
        """Bins as ascending float64 numbers, and the count of values in each, on the CPU."""
        assert self.low is not None
        assert self.high is not None
        low, high = self.low.cpu().double().view(1), self.high.cpu().double().view(1)
        counts, one = self.counts.cpu(), torch.ones(1, dtype=torch.int64)
        if torch.equal(low, high):
            return low, counts.sum().view(1)
        # A bfloat16 is the upper half of a float32. Rounding may have put the number of an outer
        # bin beyond the range.
        numbers = (self.patterns.cpu() << 16).view(torch.float32).double()
        places, order = numbers.clamp(low, high).sort()
        counts = counts[order]
        # The ends are points of their own, so a grid that clips nothing is exact. The end of a
        # percentile range is off by at most 2^-8 of itself: one step at 8 bits, 256 steps at 16.
        # That changes the scale by at most 0.4 %, and the rounding error at 16 bits by 0.04 dB.
        counts[0] -= 1
        counts[-1] -= 1
        return torch.cat([low, places, high]), torch.cat([one, counts, one])

    def _add(self, batches: int, low: Tensor, high: Tensor, counts: Tensor | None) -> None:
        self.batches += batches
        self.low = low if self.low is None else torch.minimum(self.low.to(low.device), low)
        self.high = high if self.high is None else torch.maximum(self.high.to(high.device), high)
        if counts is not None:
            counts[self.patterns.to(counts.device)] += self.counts.to(counts.device)
            patterns = counts.nonzero().squeeze(1)
            self.patterns, self.counts = patterns.to(torch.int32), counts[patterns]


def observed_ranges(
    observers: Sequence[RangeObserver],
) -> tuple[Float[Tensor, " observers"], Float[Tensor, " observers"]]:
    """Lowest and highest value of each, on the CPU; zeros for an observer without data."""
    lows, highs = [o.low for o in observers], [o.high for o in observers]
    low, high = ([0.0 if x is None else float(x) for x in ends] for ends in (lows, highs))
    return torch.tensor(low), torch.tensor(high)


def estimate_ranges(
    observers: Sequence[RangeObserver], scheme: Scheme, estimator: RangeEstimator
) -> tuple[Float[Tensor, " observers"], Float[Tensor, " observers"]]:
    """The range that `estimator` chooses for each observer, on the CPU, for a grid as `scheme` has
    it."""
    low, high = observed_ranges(observers)
    if not estimator.needs_histogram:
        return low, high
    used = [i for i, observer in enumerate(observers) if observer.batches]
    for start in range(0, len(used), _OBSERVERS_AT_ONCE):
        rows = used[start : start + _OBSERVERS_AT_ONCE]
        points = WeightedPoints.of([observers[i].points for i in rows])
        if estimator.name == "percentile":
            low[rows], high[rows] = points.percentile_range(estimator.percentile)
        else:
            scale, offset = least_error_grid(points, low[rows], high[rows], scheme, estimator.gamma)
            low[rows], high[rows] = scale * offset, scale * (offset + scheme.steps)
    return low, high


class WeightedPoints:
    """Sorted points on the number line with a weight each, for several groups at once; both float64
    [groups, points]. `weights` is overwritten."""

    def __init__(
        self, places: Float[Tensor, "groups points"], weights: Float[Tensor, "groups points"]
    ):
        self.places = places
        # With running sums, the sum of w (x - v)^2 over any interval takes two lookups, however
        # many values there are. That made the search 5 times faster (docs/log/grid.md).
        # weight, weight times place, and weight times place squared; the first column is 0
        self.sums = places.new_zeros(3, len(places), places.shape[1] + 1)
        for sums in self.sums:
            torch.cumsum(weights, 1, out=sums[:, 1:])
            weights.mul_(places)

    @classmethod
    def of(cls, groups: Sequence[tuple[Tensor, Tensor]]) -> WeightedPoints:
        """From each group's ascending places and weights; short groups are padded with weight 0."""
        size = max(len(places) for places, _ in groups)
        places = torch.stack([torch.cat([p, p[-1:].expand(size - len(p))]) for p, _ in groups])
        weights = torch.zeros_like(places)
        for row, (_, counts) in zip(weights, groups, strict=True):
            row[: len(counts)] = counts
        return cls(places, weights)

    def below(self, bounds: Float[Tensor, "groups bounds"]) -> Int64[Tensor, "groups bounds"]:
        """Number of points below each bound, an index into `sums`."""
        return torch.searchsorted(self.places, bounds)

    def percentile_range(
        self, percentile: float
    ) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
        """The narrowest range that leaves `(100 - percentile) %` of the weight outside at either
        end."""
        weight = self.sums[0, :, 1:].contiguous()
        shares = [[share_outside(total, percentile)] for total in weight[:, -1].tolist()]
        outside = weight.new_tensor(shares)
        first = torch.searchsorted(weight, outside, right=True)
        last = torch.searchsorted(weight, weight[:, -1:] - outside)
        columns = torch.cat([first, last], 1).clamp(max=self.places.shape[1] - 1)
        lower, upper = self.places.gather(1, columns).float().unbind(1)
        return lower, upper


def share_outside(count: float, percentile: float) -> int:
    """`(100 - percentile) %` of a count, rounded down."""
    # a product that misses a whole number by float64's rounding alone counts as that number
    return math.floor(count * (100 - percentile) / 100 * (1 + 1e-12) + 1e-9)


def least_error_grid(
    points: WeightedPoints,
    low: Float[Tensor, " groups"],
    high: Float[Tensor, " groups"],
    scheme: Scheme,
    gamma: float,
) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
    """(scale, offset) of each group, from its lowest and highest value and the bitwidth and
    symmetry of `scheme`; `gamma` is the weight of the squared error of a clipped value."""
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    smallest = smallest_scale(scheme)
    is_narrow = (high - low) / scheme.steps < smallest
    candidates = _symmetric_candidates if scheme.symmetric else _asymmetric_candidates
    scale, offset = candidates(low, high, scheme)
    # twice: AIMET's candidates, then finer ones around the best of them
    for spread in (0.01 if scheme.symmetric else 1 / 16, None):
        scale = scale.clamp(min=smallest)
        best = _errors(points, scale, offset, scheme.steps, gamma).argmin(1, keepdim=True)
        scale, offset = scale.gather(1, best), offset.gather(1, best)
        if spread is not None:
            scale, offset = _neighbors(scale, offset, spread, scheme)
    scale, offset = scale.squeeze(1), offset.squeeze(1)
    # a range that float32 cannot tell from zero: the encoding that `encoding_from_range` gives
    if not scheme.symmetric:
        offset = torch.where(is_narrow, torch.round(low / smallest), offset)
    return torch.where(is_narrow, smallest, scale).float(), offset.int()


def _symmetric_candidates(
    low: Tensor, high: Tensor, scheme: Scheme
) -> tuple[Candidates, Candidates]:
    widest = 2 * torch.maximum(high, -low).unsqueeze(1) / scheme.steps
    # up to 1.01 of the widest scale: the 101 steps of AIMET's search, so that no choice is worse
    hundredths = torch.arange(1, 102, device=low.device, dtype=torch.float64) / 100
    # At 2 bits the widest grid ends where clipping begins, and rounding of the scale decides on
    # which side. Both sides are candidates.
    scale = torch.cat([hundredths, hundredths * (1 + 2**-22)]) * widest
    return scale, torch.full_like(scale, scheme.symmetric_offset)


def _asymmetric_candidates(
    low: Tensor, high: Tensor, scheme: Scheme
) -> tuple[Candidates, Candidates]:
    steps = scheme.steps
    tiny = torch.finfo(torch.float32).tiny
    widest = ((high - low) / steps).clamp(min=tiny).view(-1, 1, 1)
    observed = torch.round(low.view(-1, 1, 1) / widest)
    scale = torch.arange(1, 18, device=low.device).view(1, -1, 1) / 16 * widest
    count = min(steps + 1, 20)
    places = torch.linspace(-steps, 0, count, device=low.device, dtype=torch.float64).round()
    offset = torch.cat([places.expand(len(low), 1, -1), observed], 2)
    first = torch.maximum(scale * offset, observed * widest)
    last = torch.minimum(scale * (offset + steps), (observed + steps) * widest)
    cut = ((last - first) / steps).clamp(min=tiny)
    return cut.flatten(1), torch.round(first / cut).clamp(-steps, 0).flatten(1)


def _neighbors(
    scale: Candidates, offset: Candidates, spread: float, scheme: Scheme
) -> tuple[Candidates, Candidates]:
    """Grids around one grid per group, which is among them."""
    device = scale.device
    scales = scale * torch.linspace(1 - spread, 1 + spread, 21, device=device, dtype=torch.float64)
    if scheme.symmetric:
        return scales, offset.expand_as(scales)
    reach = max(1, round(scheme.steps * spread / 2))
    count = 9 if reach > 1 else 3
    moves = torch.linspace(-reach, reach, count, device=device, dtype=torch.float64).round()
    offsets = (offset + moves).clamp(-scheme.steps, 0)
    shape = len(scale), scales.shape[1], offsets.shape[1]
    scales = scales.unsqueeze(2).expand(shape).flatten(1)
    return scales, offsets.unsqueeze(1).expand(shape).flatten(1)


def _errors(
    points: WeightedPoints, scale: Candidates, offset: Candidates, steps: int, gamma: float
) -> Candidates:
    """The error of each candidate: exact up to 31 steps, modeled above."""
    first, last = offset * scale, (offset + steps) * scale
    at = points.below(torch.cat([first - scale / 2, last + scale / 2], 1)).expand(3, -1, -1)
    below, not_above = points.sums.gather(2, at).split(scale.shape[1], 2)
    above = points.sums[:, :, -1:] - not_above
    clipped = _squared_distance(below, first) + _squared_distance(above, last)
    clipped = gamma * clipped.clamp_(min=0)
    if steps > _MOST_EXACT_STEPS:
        near = points.below(torch.cat([-scale / 2, scale / 2], 1)).expand(3, -1, -1)
        low, not_high = points.sums.gather(2, near).split(scale.shape[1], 2)
        weight, _, squares = not_high - low
        inside = points.sums[0, :, -1:] - below[0] - above[0]
        return clipped + squares + (inside - weight).clamp_(min=0) * scale.square() / 12
    # the sum over all values has weight 1, so clipped ones count gamma - 1 times more
    at_once = max(1, _LOOKUPS_AT_ONCE // (steps * len(scale)))
    chunks = zip(scale.split(at_once, 1), offset.split(at_once, 1), strict=True)
    unweighted = torch.cat([_unweighted_errors(points, s, o, steps) for s, o in chunks], 1)
    return unweighted + clipped * ((gamma - 1) / gamma)


def _squared_distance(sums: Float[Tensor, "3 groups candidates"], v: Candidates) -> Candidates:
    """Sum of w (x - v)^2 from the sums of w, w x and w x^2."""
    weight, total, squares = sums
    return squares - 2 * v * total + v.square() * weight


def _unweighted_errors(
    points: WeightedPoints, scale: Candidates, offset: Candidates, steps: int
) -> Candidates:
    """Sum of w (x - x_hat)^2, with gamma 1."""
    step = torch.arange(steps, device=scale.device, dtype=torch.float64) + 0.5
    middles = ((offset.unsqueeze(2) + step) * scale.unsqueeze(2)).flatten(1)
    place = points.below(middles)
    weight, total, _ = points.sums
    g = middles.mul_(weight.gather(1, place)).sub_(total.gather(1, place))
    last = (offset + steps) * scale
    all_at_last = _squared_distance(points.sums[:, :, -1:], last)
    return all_at_last - 2 * scale * g.view(*scale.shape, steps).sum(2)
