"""What an observer remembers of the values it saw: the values themselves while they are few, bins after that.

Values are kept as long as they take no more room than their bins would; the one that is too many turns all of them into bins (`histogram.py`). Either way what
is remembered depends on the data alone, so two halves merge into the whole exactly. With it, whatever is computed from up to 131,070 values (16,382 a group
where there are more than 16 groups) is computed from the data itself, and from bins beyond that.

`points` gives both in one form: places in ascending order, a count for each, and running sums, from which the error of a grid is read (`range_search.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qwlora.grid.merging_histogram import Histogram, half_of


class Distribution:
    """The values of a number of groups, each group having as many as the others.

    Attributes:
        values: the batches, float32 [groups, values]; empty once there are bins.
        histogram: the bins; None while values are kept.
    """

    def __init__(self, groups: int, device: torch.device):
        self.groups = groups
        self.device = device
        self.values: list[Float[Tensor, "groups values"]] = []
        self.histogram: Histogram | None = None

    @property
    def remembered(self) -> int:
        """Numbers that are remembered of each group: values, or bins."""
        return 2 * self.histogram.half if self.histogram is not None else self.kept

    @property
    def kept(self) -> int:
        """Values that are kept of each group."""
        return sum(x.shape[1] for x in self.values)

    @property
    def most_kept(self) -> int:
        """How many values of a group take as much room as its bins."""
        return 2 * (2 * half_of(self.groups) - 1)

    def update(
        self, x: Float[Tensor, "groups values"], magnitude: Float[Tensor, " groups"]
    ) -> None:
        """Take in finite values whose largest magnitude in each group is `magnitude`."""
        if self.histogram is None and self.kept + x.shape[1] <= self.most_kept:
            self.values.append(x.to(torch.float32, copy=True))
        else:
            self._bins().update(x.float(), magnitude)

    def merge(self, other: Distribution) -> None:
        """Take in what `other` did."""
        if other.histogram is not None:
            self._bins().merge(other.histogram)
        for x in list(other.values):
            self.update(x, x.abs().amax(1))

    def points(
        self, groups: slice, low: Float[Tensor, " groups"], high: Float[Tensor, " groups"]
    ) -> Points:
        """Everything seen of some groups, whose lowest and highest values are `low` and `high`."""
        if self.histogram is None:
            ascending = torch.cat([x[groups] for x in self.values], 1).sort(1).values.double()
            return Points(running_sums(torch.ones_like(ascending), ascending), ascending)
        return _points_of_bins(
            self.histogram, groups, low.double().unsqueeze(1), high.double().unsqueeze(1)
        )

    def percentile_range(
        self, percentile: float
    ) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
        """The narrowest range that leaves `(100 - percentile) %` of the values, rounded down, outside on either side; of bins, their outer edges."""
        if self.histogram is None:
            ascending = torch.cat(self.values, 1).sort(1).values
            outside = _share(ascending.shape[1], percentile)
            return ascending[:, outside], ascending[:, -1 - outside]
        seen = self.histogram.counts.cumsum(1)
        outside_of = torch.tensor(
            [[_share(count, percentile)] for count in seen[:, -1].tolist()], device=self.device
        )
        lower, _ = self.histogram.edges(torch.searchsorted(seen, outside_of, right=True).squeeze(1))
        _, upper = self.histogram.edges(
            torch.searchsorted(seen, seen[:, -1:] - outside_of).squeeze(1)
        )
        return lower, upper

    def _bins(self) -> Histogram:
        """The histogram; what was kept until now is counted in it."""
        if self.histogram is None:
            self.histogram = Histogram(self.groups, self.device)
            for x in self.values:
                self.histogram.update(x, x.abs().amax(1))
            self.values = []
        return self.histogram


def _share(count: float, percentile: float) -> int:
    """`(100 - percentile) %` of a count, rounded down; a product that is whole but for float64's last bits is whole."""
    return math.floor(count * (100 - percentile) / 100 * (1 + 1e-12) + 1e-9)


def _points_of_bins(
    histogram: Histogram,
    groups: slice,
    low: Float[Tensor, "groups 1"],
    high: Float[Tensor, "groups 1"],
) -> Points:
    """The middles of the bins that hold something, and the empty ones between. Bin 0, as wide as two others, becomes two with half of its count each."""
    widths, half = histogram.widths()[groups].double(), histogram.half
    reach = min(
        half, 1 + int((torch.maximum(-low, high).squeeze(1) / widths).max())
    )  # on either side of zero
    counts = torch.empty(len(widths), 2 * reach, dtype=torch.float64, device=widths.device)
    counts[:, :reach] = histogram.counts[groups, half - reach : half]
    counts[:, reach:] = histogram.counts[groups, half - 1 : half - 1 + reach]
    counts[:, reach - 1 : reach + 1] /= 2
    middles = torch.arange(
        0.5 - reach, reach, device=widths.device, dtype=torch.float64
    ) * widths.unsqueeze(1)
    middles[:, reach - 1 : reach + 1] = 0
    middles.clamp_(low, high)  # the outermost bins reach past the data; what is in them does not
    return Points(running_sums(counts, middles), bins=(widths.unsqueeze(1), low, high))


def running_sums(counts: Tensor, places: Tensor) -> Tensor:
    """The `sums` of `Points`, of `counts` values at each of ascending `places`; overwrites `counts`."""
    sums = torch.empty(
        3, counts.shape[0], counts.shape[1] + 1, dtype=torch.float64, device=counts.device
    )
    sums[:, :, 0] = 0
    for power in range(3):
        torch.cumsum(counts if power == 0 else counts.mul_(places), 1, out=sums[power, :, 1:])
    return sums


@dataclass(frozen=True)
class Points:
    """Places on the number line with counts.

    Args:
        sums: running sums of count, count times place, and count times place squared; float64 [3, groups, count + 1], the first column 0.
        places: float64 [groups, count], ascending, where they are single values; None where they are bins.
        bins: where they are bins, their width, and the lowest and highest value in any; each float64 [groups, 1]. As many bins lie on either side of zero.
    """

    sums: Float[Tensor, "3 groups bounds"]
    places: Float[Tensor, "groups points"] | None = None
    bins: (
        tuple[Float[Tensor, "groups 1"], Float[Tensor, "groups 1"], Float[Tensor, "groups 1"]]
        | None
    ) = None

    @property
    def count(self) -> int:
        """Points of each group."""
        return self.sums.shape[2] - 1

    def below(self, bounds: Float[Tensor, "groups bounds"]) -> Int64[Tensor, "groups bounds"]:
        """How many points lie below each bound, an index into `sums`; a point at a bound counts either way."""
        if self.places is not None:
            return torch.searchsorted(self.places, bounds)
        assert self.bins is not None
        width, _, _ = self.bins
        return (bounds / width).add_((self.count + 1) / 2).clamp_(0, self.count).long()

    def percentile_range(
        self, percentile: float
    ) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
        """The narrowest range between places that leaves at most `(100 - percentile) %` of the counts outside on either side."""
        assert self.places is not None
        seen = self.sums[0, :, 1:].contiguous()
        outside = torch.tensor(
            [[float(_share(count, percentile))] for count in seen[:, -1].tolist()],
            dtype=seen.dtype,
            device=seen.device,
        )
        slack = seen[:, -1:] * 1e-12  # counts that are not whole have float64's last bits
        first = torch.searchsorted(seen, outside + slack, right=True)
        last = torch.searchsorted(seen, seen[:, -1:] - outside - slack)
        lower, upper = (
            self.places.gather(1, column.clamp(max=self.count - 1)).squeeze(1).float()
            for column in (first, last)
        )
        return lower, upper

    def outside(
        self, lower: Float[Tensor, "groups bounds"], upper: Float[Tensor, "groups bounds"]
    ) -> tuple[Tensor, Tensor]:
        """The sums, [3, groups, bounds], of the points below `lower` and of those above `upper`. A bin is outside as soon as some of it may be."""
        if self.bins is not None:
            width, low, high = self.bins
            lower = torch.where(lower <= low, -torch.inf, lower + width / 2)
            upper = torch.where(upper >= high, torch.inf, upper - width / 2)
        at = self.below(torch.cat([lower, upper], 1))
        below, not_above = self.sums.gather(2, at.expand(3, -1, -1)).split(lower.shape[1], 2)
        return below, self.sums[:, :, -1:] - not_above
