"""The range of an activation: what is kept of it during calibration, and what follows from that.

Kept are exact ends, the values far out, and a sample:

    ends      float32 [batches, 2]: lowest and highest value of each batch
    tails     lowest and highest values: the ends of the 64 rows of each batch that reach furthest
    sample    up to 12,288 values of all batches, each with the same probability

A sample alone misses the few values far out, and ranges depend on those. A row is the last axis.
The ends of all rows cost hardly more than those of the batch, and rows after the 64th rarely hold
more than one value this large. Where some rows reach more than twice as far and may have many such
values (the first token of a language model), the furthest 8 rows are kept whole. Between `bounds`
and the ends, no value is missing.

A batch costs one pass for ends and tails, and a copy of at most 4,096 values: rows at equal
distances, with all channels if they fit. When the sample is full, half of it is dropped and half as
much is taken from later batches; the same happens before a batch that would contribute more than
smaller ones before it. So memory is constant, except for the ends of each batch, and every
estimator works on one pass over the data, for any grid. If all values fit, the sample is the data.

Merging is exact for ends and tails. The denser of two samples is thinned to the density of the
other. `PartialObserver` is exact for all, for processes that share the batches.

Ranges are estimated for many activations at a time:

    min-max                             the extremes of all batches, exactly
    percentile, squared-error, sqnr     on tails and sample, between the exact extremes

A value of the tails has weight 1; a sampled value between the tails has weight (values observed -
tail values) / sampled values. If the sample is complete, percentiles are those of the data, bit for
bit.

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

import copy
import math
from collections import ChainMap, defaultdict
from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qwlora.errors import CalibrationError
from qwlora.grid.encoding import smallest_scale
from qwlora.grid.scheme import RangeEstimator, Scheme

VALUES_A_BATCH = 2**12
VALUES = 3 * VALUES_A_BATCH
ROWS_IN_TAIL, ROWS_LOOKED_AT, VALUES_IN_TAIL = 2**6, 2**3, 2**7  # of a batch
_FAR_OUT = 2.0
_MOST_IN_TAIL = 2**11
# Multiples of these mod 1 fill an interval evenly: where in a stride each batch begins.
_ROW_TURN, _COLUMN_TURN = 0.7548776662466927, 0.5698402909980532
_POINTS_AT_ONCE = 2**17
_MOST_EXACT_STEPS = 31
# Lookups per chunk: fits a processor's cache and stays below the size that torch parallelizes.
_LOOKUPS_AT_ONCE = 2**15

Candidates = Float[Tensor, "groups candidates"]


class SampleObserver:
    """Ends, tails and sample of one activation.

    Args:
        sampled: whether to keep tails and sample; min-max needs only the ends.
    """

    def __init__(self, sampled: bool):
        self.sampled = sampled
        self.batches = 0
        self.count = 0  # values that passed
        self.row_stride = self.column_stride = 0  # 0: not chosen yet
        # low ends and tails are negated, so that both sides are the largest of something
        self._ends: list[Tensor] = []  # of each batch, [2]
        self._tails: list[Tensor] = []  # [2, values]
        self._sample: list[Tensor] = []
        self._tail_count = self._sample_count = 0
        self._bounds = (-math.inf, -math.inf)

    @property
    def ends(self) -> Float[Tensor, "batches 2"]:
        """The lowest and the highest value of each batch, float32."""
        if not self._ends:
            return torch.empty(0, 2)
        low, high = torch.stack(self._ends, 1)
        return torch.stack([-low, high], 1)

    @property
    def low(self) -> Tensor | None:
        """The lowest value of all, [] float32; None without data."""
        return self.ends[:, 0].amin() if self.batches else None

    @property
    def high(self) -> Tensor | None:
        """The highest value of all, [] float32; None without data."""
        return self.ends[:, 1].amax() if self.batches else None

    @property
    def sample(self) -> Float[Tensor, " values"]:
        """The sampled values, float32."""
        return torch.cat(self._sample) if self._sample else torch.empty(0)

    @property
    def tails(self) -> Float[Tensor, "2 values"]:
        """float32: negated low values, and high values far out. Some may be inside `bounds`."""
        return torch.cat(self._tails, 1) if self._tails else torch.empty(2, 0)

    @property
    def bounds(self) -> Float[Tensor, " 2"]:
        """How far in the tails are complete: a negated low value, and a high value."""
        return torch.tensor(self._bounds)

    @property
    def is_complete(self) -> bool:
        """Whether the sample is all of the data."""
        return self.sampled and self.row_stride * self.column_stride <= 1

    def update(self, x: Float[Tensor, "*shape"]) -> None:
        """Observe the values of `x`; an empty tensor is not a batch."""
        if not x.numel():
            return
        if x.requires_grad:
            x = x.detach()
        if self.sampled:
            rows = x  # along the last axis, with a single axis of rows where that needs no copy
            if x.ndim < 2 or x.is_contiguous():
                rows = x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)
            ends = self._take_tails(rows, torch.stack([-rows.amin(-1), rows.amax(-1)]).flatten(1))
        else:
            ends = torch.stack([-x.amin(), x.amax()])  # two passes, faster than torch.aminmax
        self._ends.append(ends.to(torch.float32, copy=True))
        self.batches += 1
        self.count += x.numel()
        if self.sampled:
            self._take(rows)

    def merge(self, other: SampleObserver) -> None:
        """Add what `other` observed."""
        if not other.batches:
            return
        if self.sampled and not other.sampled:
            raise CalibrationError(
                "it was observed without a sample, which this observer needs; observe with the "
                "same observers on both sides"
            )
        vars(self).update(vars(self.to(other._ends[0].device)))  # moves itself to that device
        self._ends += other._ends
        self.batches += other.batches
        self.count += other.count
        if not self.sampled:
            return
        self._add_tails(other.tails, other._bounds)
        if not self.row_stride:
            self.row_stride, self.column_stride = other.row_stride, other.column_stride
        ours, theirs = self.row_stride * self.column_stride, other.row_stride * other.column_stride
        added = other.sample
        if theirs < ours:
            added = added[_any_of(len(added), round(len(added) * theirs / ours)).to(added.device)]
        elif ours < theirs:
            self._thin(round(self._sample_count * ours / theirs))
            self.row_stride, self.column_stride = other.row_stride, other.column_stride
        self._add_to_sample(added)
        while self._sample_count > VALUES:
            self._halve(of_rows=self.row_stride <= self.column_stride)

    def to(self, device: torch.device) -> SampleObserver:
        """A copy of the observer on `device`."""
        moved = copy.copy(self)
        moved._ends, moved._tails, moved._sample = (
            [tensor.to(device) for tensor in tensors]
            for tensors in (self._ends, self._tails, self._sample)
        )
        return moved

    def _take_tails(self, rows: Tensor, reach: Float[Tensor, "2 rows"]) -> Float[Tensor, " 2"]:
        """Keep the values furthest out, given how far each row reaches on either side; returns how
        far all rows reach."""
        # of half of the rows at most, so that the bounds never cross
        furthest, where = reach.topk(max(1, min(ROWS_IN_TAIL, reach.shape[1] // 2)))
        lows, highs = furthest.tolist()
        tails, bounds = furthest, (lows[-1], highs[-1])
        if lows[0] > _FAR_OUT * lows[-1] or highs[0] > _FAR_OUT * highs[-1]:
            looked_at = where[:, :ROWS_LOOKED_AT].flatten()
            values = rows.reshape(-1, rows.shape[-1]).index_select(0, looked_at).view(2, -1)
            values[0].neg_()
            if values.shape[1] > VALUES_IN_TAIL:
                values = values.topk(VALUES_IN_TAIL).values
                bounds = _further(bounds, values[:, -1].tolist())
            tails = torch.cat([values, furthest[:, ROWS_LOOKED_AT:]], 1)
        self._add_tails(tails, bounds)
        return furthest[:, 0]

    def _add_tails(self, tails: Float[Tensor, "2 values"], bounds: Sequence[float]) -> None:
        self._tails.append(tails.float())
        self._tail_count += tails.shape[1]
        self._bounds = _further(self._bounds, bounds)
        if self._tail_count > _MOST_IN_TAIL:
            kept = self.tails.topk(_MOST_IN_TAIL // 2).values
            self._tails, self._tail_count = [kept], kept.shape[1]
            self._bounds = _further(self._bounds, kept[:, -1].tolist())

    def _take(self, rows: Tensor) -> None:
        columns = rows.shape[-1]
        count = rows.numel() // columns
        if not self.row_stride:  # all columns if a row is within a batch's limit
            self.row_stride, self.column_stride = count, -(-columns // VALUES_A_BATCH)
            if columns <= VALUES_A_BATCH:
                self.row_stride, self.column_stride = -(-count // (VALUES_A_BATCH // columns)), 1
        while -(-count // self.row_stride) * -(-columns // self.column_stride) > VALUES_A_BATCH:
            self._halve(of_rows=self.row_stride < count)
        first = int(self.batches * _ROW_TURN % 1 * self.row_stride)
        taken = _every(rows, first, self.row_stride)
        if self.column_stride > 1:
            first = int(self.batches * _COLUMN_TURN % 1 * self.column_stride)
            taken = taken[:, first :: self.column_stride]
        self._add_to_sample(taken)
        while self._sample_count > VALUES:  # a stride beyond the axis would skip whole batches
            self._halve(
                of_rows=self.column_stride >= columns
                or self.row_stride <= min(self.column_stride, count - 1)
            )

    def _add_to_sample(self, values: Tensor) -> None:
        self._sample.append(values.to(torch.float32, copy=True).flatten())
        self._sample_count += values.numel()

    def _halve(self, of_rows: bool) -> None:
        self._thin(self._sample_count // 2)
        if of_rows:
            self.row_stride *= 2
        else:
            self.column_stride *= 2

    def _thin(self, keep: int) -> None:
        sample = self.sample
        self._sample = [sample[_any_of(self._sample_count, keep).to(sample.device)]]
        self._sample_count = keep


class PartialObserver(SampleObserver):
    """Observes some of the batches after `before`; other processes observe the others.

    Which values a sample keeps depends on the shapes of the batches alone. If all are alike, each
    process knows where the values of the others belong, and has nan there. `complete` returns the
    observer of one process with all batches, bit for bit.
    """

    def __init__(self, before: SampleObserver):
        super().__init__(before.sampled)
        vars(self).update(vars(before.to(before.ends.device)))
        self._shapes = set[torch.Size]()
        self._passed = 0  # batches of others that are still to be counted
        self._tails_of: dict[int, tuple[Tensor, Sequence[float]]] = {}  # by number of the batch

    def pass_over(self) -> None:
        """Count a batch of another process."""
        self._passed += 1

    def update(self, x: Float[Tensor, "*shape"]) -> None:
        self._shapes.add(x.shape)
        self._count_passed(x.device)
        super().update(x)

    @property
    def part(self) -> tuple[Any, ...]:
        """What the other processes need for `complete`."""
        self._count_passed(self.ends.device)
        return self._shapes, self.ends, self.sample, self._tails_of

    def complete(self, parts: Sequence[tuple[Any, ...]]) -> SampleObserver | None:
        """The observer of all batches, from the parts of all processes; None if their shapes
        differ."""
        shapes, ends, samples, tails = zip(*parts, strict=True)
        if len(self._shapes) > 1 or any(other != self._shapes for other in shapes):
            return None
        whole, device = SampleObserver(self.sampled), self.ends.device
        vars(whole).update({key: value for key, value in vars(self).items() if key in vars(whole)})
        known_ends, known_sample = (
            reduce(lambda a, b: torch.where(a.isnan(), b, a), parts).to(device)
            for parts in (ends, samples)
        )
        whole._ends = list(known_ends * known_ends.new_tensor([-1, 1]))  # low ends are negated
        whole._sample = [known_sample]
        for _, (values, bounds) in sorted(ChainMap(*tails).items()):
            whole._add_tails(values.to(device), bounds)
        return whole

    def _count_passed(self, device: torch.device) -> None:
        shape = next(iter(self._shapes), torch.Size([0]))
        unknown = torch.full((), math.nan, device=device).expand(shape)
        for _ in range(self._passed if unknown.numel() else 0):
            self._ends.append(unknown.new_full((2,), math.nan))
            self.batches += 1
            self.count += unknown.numel()
            if self.sampled:
                self._take(unknown if unknown.ndim > 1 else unknown.reshape(-1, 1))
        self._passed = 0

    def _add_tails(self, tails: Float[Tensor, "2 values"], bounds: Sequence[float]) -> None:
        self._tails_of[self.batches] = tails.float(), bounds


def _further(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    return max(a[0], b[0]), max(a[1], b[1])


def _every(rows: Float[Tensor, "*axes columns"], first: int, stride: int) -> Tensor:
    """Rows [some, columns] at equal distances over all axes but the last; copies only those."""
    if rows.ndim == 2:
        return rows[first::stride]
    count = rows.numel() // rows.shape[-1]
    chosen = torch.arange(min(first, count), count, stride, device=rows.device)
    return rows[torch.unravel_index(chosen, rows.shape[:-1])]


@lru_cache(maxsize=16)  # activations have few sizes, and drawing takes longer than a small layer
def _any_of(count: int, keep: int) -> Tensor:
    """Ascending indices of `keep` out of `count`; always the same."""
    generator = torch.Generator().manual_seed(count)
    return torch.randperm(count, generator=generator)[:keep].sort().values


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
