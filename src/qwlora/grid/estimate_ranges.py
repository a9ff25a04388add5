"""From what observers kept to ranges, many tensors at a time.

    min-max                             the extremes of all batches, exactly
    percentile, squared-error, sqnr     on tails and sample, between the exact extremes

A value of the tails has weight 1; a sampled value between the tails has weight (values observed -
tail values) / sampled values (see `activation_observer.py`). If the sample is complete, percentiles
are those of the data, bit for bit.

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
is modeled: values within half a step of zero lose themselves, all others the mean square of
rounding.

    error = gamma * (error of clipped values) + sum over |x| < scale / 2 of x^2
          + (weight of the others) * scale^2 / 12
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qwlora.grid.activation_observer import SampleObserver
from qwlora.grid.encoding import smallest_scale
from qwlora.grid.scheme import RangeEstimator, Scheme

_POINTS_AT_ONCE = 2**17
_MOST_EXACT_STEPS = 31
# Lookups per chunk: fits a processor's cache and stays below the size that torch parallelizes.
_LOOKUPS_AT_ONCE = 2**15

Candidates = Float[Tensor, "groups candidates"]


def observed_ranges(
    observers: Sequence[SampleObserver],
) -> tuple[Float[Tensor, " observers"], Float[Tensor, " observers"]]:
    """Lowest and highest value of each, on the CPU; zeros for an observer without data."""
    ends = torch.zeros(2, len(observers))
    for i, observer in enumerate(observers):
        batches = observer.ends.cpu()
        if len(batches):
            ends[0, i], ends[1, i] = batches[:, 0].amin(), batches[:, 1].amax()
    return ends[0], ends[1]


def estimate_ranges(
    observers: Sequence[SampleObserver], scheme: Scheme, estimator: RangeEstimator
) -> tuple[Float[Tensor, " observers"], Float[Tensor, " observers"]]:
    """The range that `estimator` chooses for each, on the CPU.

    Args:
        observers: of one tensor each, with finite values; with a sample if the estimator needs one.
        scheme: bitwidth and symmetry of the grid that the range is for.
    """
    low, high = observed_ranges(observers)
    if not estimator.needs_sample:
        return low, high
    alike: dict[tuple[int, bool, int], list[int]] = defaultdict(list)  # with equally many points
    for i, o in enumerate(observers):
        alike[len(o.sample), o.is_complete, o.tails.shape[1]].append(i)
    chunks: list[list[int]] = []  # as many as are processed at once
    for (sampled, _, _), group in alike.items():
        size = max(1, _POINTS_AT_ONCE // max(1, sampled))
        chunks += (group[i : i + size] for i in range(0, len(group), size))
    for indices in chunks:
        points = _points([observers[i] for i in indices])
        rows = torch.tensor(indices)
        if estimator.name == "percentile":
            first, last = points.percentile_range(estimator.percentile)
            low[rows] = torch.maximum(low[rows], first)
            high[rows] = torch.minimum(high[rows], last)
        else:
            scale, offset = least_error_grid(points, low[rows], high[rows], scheme, estimator.gamma)
            low[rows], high[rows] = scale * offset, scale * (offset + scheme.steps)
    return low, high


def _points(observers: Sequence[SampleObserver]) -> WeightedPoints:
    """Tails and sample of several observers, sorted and weighted."""

    def sorted_(values: list[Tensor]) -> Tensor:
        """Along the last axis; several times faster than `torch.sort` on the CPU."""
        return torch.from_numpy(np.sort(torch.stack(values).cpu().numpy(), axis=-1))

    samples = sorted_([o.sample for o in observers])
    if observers[0].is_complete:
        places = samples.double()
        return WeightedPoints(places, torch.ones_like(places))
    bounds = torch.stack([o.bounds.cpu() for o in observers]).unsqueeze(2)  # [observers, 2, 1]
    far = sorted_([o.tails for o in observers])
    # A tail value on the inner side of a bound may also be in the sample: it moves to the bound
    # with weight 0.
    tails, tail_weights = far.maximum(bounds), (far >= bounds).double()
    first, last = -bounds[:, 0], bounds[:, 1].contiguous()
    begin = torch.searchsorted(samples, first)
    end = torch.searchsorted(samples, last, right=True)
    missing = torch.tensor([o.count for o in observers]) - tail_weights.sum((1, 2))
    column = torch.arange(samples.shape[1])
    is_between = (column >= begin) & (column < end)
    weights = missing.clamp(min=0).unsqueeze(1) / (end - begin).clamp(min=1) * is_between
    return WeightedPoints(
        torch.cat([-tails[:, 0].flip(1), samples.clamp(first, last), tails[:, 1]], 1).double(),
        torch.cat([tail_weights[:, 0].flip(1), weights, tail_weights[:, 1]], 1),
    )


class WeightedPoints:
    """Sorted points on the number line with a weight each, for several groups at once.

    A value of a complete data set has weight 1; a value of a sample stands for several and weighs
    as many. With running sums, the sum of `w (x - v)^2` over any interval takes two lookups, so the
    cost of judging a grid does not depend on the number of values.

    Args:
        places: float64 [groups, points], ascending.
        weights: float64 [groups, points]; overwritten.
    """

    def __init__(
        self, places: Float[Tensor, "groups points"], weights: Float[Tensor, "groups points"]
    ):
        self.places = places
        # weight, weight times place, and weight times place squared; the first column is 0
        self.sums = places.new_zeros(3, len(places), places.shape[1] + 1)
        for power in range(3):
            torch.cumsum(
                weights if power == 0 else weights.mul_(places), 1, out=self.sums[power, :, 1:]
            )

    def below(self, bounds: Float[Tensor, "groups bounds"]) -> Int64[Tensor, "groups bounds"]:
        """Number of points below each bound, which is an index into `sums`."""
        return torch.searchsorted(self.places, bounds)

    def percentile_range(
        self, percentile: float
    ) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
        """The narrowest range between places that leaves at most `(100 - percentile) %` of the
        weight outside at either end."""
        weight = self.sums[0, :, 1:].contiguous()
        outside = torch.tensor(
            [[float(share_outside(total, percentile))] for total in weight[:, -1].tolist()],
            dtype=weight.dtype,
            device=weight.device,
        )
        slack = weight[:, -1:] * 1e-12  # fractional weights add up with float64's rounding
        first = torch.searchsorted(weight, outside + slack, right=True)
        last = torch.searchsorted(weight, weight[:, -1:] - outside - slack)
        most = self.places.shape[1] - 1
        lower, upper = (
            self.places.gather(1, column.clamp(max=most)).squeeze(1).float()
            for column in (first, last)
        )
        return lower, upper


def share_outside(count: float, percentile: float) -> int:
    """`(100 - percentile) %` of a count, rounded down. A product that misses a whole number by
    float64's rounding alone counts as that number."""
    return math.floor(count * (100 - percentile) / 100 * (1 + 1e-12) + 1e-9)


def least_error_grid(
    points: WeightedPoints,
    low: Float[Tensor, " groups"],
    high: Float[Tensor, " groups"],
    scheme: Scheme,
    gamma: float,
) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
    """(scale, offset) of each group.

    Args:
        low, high: the lowest and the highest value of each group.
        scheme: bitwidth and symmetry; the granularity is ignored.
        gamma: weight of the squared error of a clipped value.
    """
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    smallest = smallest_scale(scheme)
    is_narrow = (high - low) / scheme.steps < smallest
    candidates = _symmetric_candidates if scheme.symmetric else _asymmetric_candidates
    scale, offset = candidates(low, high, scheme)
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
    return (
        scales.unsqueeze(2).expand(shape).flatten(1),
        offsets.unsqueeze(1).expand(shape).flatten(1),
    )


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
