"""From what observers kept to ranges, many tensors at a time.

    min-max                             the extremes of all batches, exactly
    percentile, squared-error, sqnr     on tails and sample, between the exact extremes

A value of the tails has weight 1; a sampled value between the tails has weight (values observed -
tail values) / sampled values (see `activation_observer.py`). If the sample is complete, percentiles
are those of the data, bit for bit. `range_search.py` finds the least error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qwlora.grid.activation_observer import SampleObserver
from qwlora.grid.range_estimator import RangeEstimator
from qwlora.grid.range_search import WeightedPoints, least_error_grid, weighted_points
from qwlora.grid.scheme import Scheme

_POINTS_AT_ONCE = 2**17


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
        return weighted_points(places, torch.ones_like(places))
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
    return weighted_points(
        torch.cat([-tails[:, 0].flip(1), samples.clamp(first, last), tails[:, 1]], 1).double(),
        torch.cat([tail_weights[:, 0].flip(1), weights, tail_weights[:, 1]], 1),
    )
