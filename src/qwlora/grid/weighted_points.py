"""Sorted values with a weight each, and their running sums: what a range search reads.

A value of a complete data set has weight 1; a value of a sample stands for several and weighs as
many. With the running sums of `w`, `w x` and `w x^2`, the sum of `w (x - v)^2` over any interval
takes two lookups, so the cost of judging a grid does not depend on the number of values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class WeightedPoints:
    """Points on the number line, for several groups at once; made by `weighted_points`.

    Args:
        places: float64 [groups, points], ascending.
        sums: running sums of weight, weight times place, and weight times place squared;
            float64 [3, groups, points + 1], the first column 0.
    """

    places: Float[Tensor, "groups points"]
    sums: Float[Tensor, "3 groups bounds"]

    def below(self, bounds: Float[Tensor, "groups bounds"]) -> Int64[Tensor, "groups bounds"]:
        """Number of points below each bound, which is an index into `sums`."""
        return torch.searchsorted(self.places, bounds)

    def outside(
        self, lower: Float[Tensor, "groups bounds"], upper: Float[Tensor, "groups bounds"]
    ) -> tuple[Tensor, Tensor]:
        """The sums, [3, groups, bounds], of the points below `lower` and of those above `upper`."""
        at = self.below(torch.cat([lower, upper], 1))
        below, not_above = self.sums.gather(2, at.expand(3, -1, -1)).split(lower.shape[1], 2)
        return below, self.sums[:, :, -1:] - not_above

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


def weighted_points(
    places: Float[Tensor, "groups points"], weights: Float[Tensor, "groups points"]
) -> WeightedPoints:
    """Points at ascending `places`, both float64; overwrites `weights`."""
    groups, count = places.shape
    sums = torch.empty(3, groups, count + 1, dtype=torch.float64, device=places.device)
    sums[:, :, 0] = 0
    for power in range(3):
        torch.cumsum(weights if power == 0 else weights.mul_(places), 1, out=sums[power, :, 1:])
    return WeightedPoints(places, sums)


def share_outside(count: float, percentile: float) -> int:
    """`(100 - percentile) %` of a count, rounded down. A product that misses a whole number by
    float64's rounding alone counts as that number."""
    return math.floor(count * (100 - percentile) / 100 * (1 + 1e-12) + 1e-9)
