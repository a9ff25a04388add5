"""From what quantizers observed to their encodings, many at a time.

    min-max          the ends of all batches, exactly
    moving-average   their average, exactly (`grid.estimators.MovingAverageObserver`)
    percentile, squared-error, sqnr      on the sample, with the exact ends

A value in the tails stands for itself, and one of the sample between them for as many as it takes to make up the count (see `observe.py`). Where the sample is
all of the data, percentiles are those of `grid.estimators.PercentileObserver`.

The squared error of a grid of more than 31 steps is modelled, not measured: values within half a step of zero lose themselves, others the mean square of
rounding, `scale^2 / 12` (`grid.range_search.least_error_of_points`). That makes thousands of searches a matter of a second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qwlora.errors import CalibrationError
from qwlora.grid.encoding import Encoding
from qwlora.grid.observers import encoding_from_range
from qwlora.grid.range_search import least_error_of_points
from qwlora.grid.scheme import PerChannel, Scheme
from qwlora.grid.value_distribution import Points, running_sums
from qwlora.messages import listed
from qwlora.simulation.fake_quantizer import Quantizer
from qwlora.simulation.observer_kind import Estimator

_POINTS_AT_ONCE = 2**17


def estimate(quantizers: Sequence[Quantizer]) -> None:
    """Give each of `quantizers` its encoding.

    Raises:
        CalibrationError: values were not finite, or an estimator needs a sample and none was kept; the first few are named.
    """
    alike: dict[tuple[Scheme, Estimator], list[Quantizer]] = defaultdict(list)
    for quantizer in quantizers:
        alike[quantizer.scheme, quantizer.estimator].append(quantizer)
    for (scheme, estimator), group in alike.items():
        _estimate_alike(group, scheme, estimator)


def _estimate_alike(group: Sequence[Quantizer], scheme: Scheme, estimator: Estimator) -> None:
    searched = [q for q in group if estimator.needs_sample and not q.is_pinned]
    if without := [q.name for q in searched if not q.observer.sampled]:
        raise CalibrationError(
            f"observer {estimator.name} needs a sample, and {without[0]} was observed without one; observe again"
        )
    low, high = _extremes(group, estimator)
    _refuse_what_is_not_finite(group, low, high)
    many = Scheme(scheme.bitwidth, scheme.symmetric, PerChannel(0))
    place = {id(q): i for i, q in enumerate(group)}
    for part in _parts(searched):
        rows = torch.tensor([place[id(q)] for q in part])
        found = _search(_points(part), low[rows], high[rows], many, estimator)
        low[rows], high[rows] = found
    for i, quantizer in enumerate(group):
        if quantizer.minimum is not None:
            low[i] = quantizer.minimum
        if quantizer.maximum is not None:
            high[i] = quantizer.maximum
    together = encoding_from_range(low, high, many)
    for i, quantizer in enumerate(group):
        device = quantizer.observer.ends.device
        quantizer.encoding = Encoding(
            scheme, together.scale[i].to(device), together.offset[i].to(device)
        )


def _extremes(group: Sequence[Quantizer], estimator: Estimator) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each, or their averages over batches; zeros where there was no data."""
    ends = []
    for quantizer in group:
        seen = quantizer.observer.ends.cpu()
        if not len(seen):
            ends.append(torch.zeros(2))
        elif estimator.name == "moving-average":
            weights = estimator.momentum * (1 - estimator.momentum) ** torch.arange(
                len(seen) - 1, -1, -1, dtype=torch.float64
            )
            ends.append(
                ((weights @ seen.double()) / (1 - (1 - estimator.momentum) ** len(seen))).float()
            )
        else:
            ends.append(torch.stack([seen[:, 0].amin(), seen[:, 1].amax()]))
    low, high = torch.stack(ends).unbind(1)
    return low.clone(), high.clone()


def _refuse_what_is_not_finite(group: Sequence[Quantizer], low: Tensor, high: Tensor) -> None:
    pinned = torch.tensor([q.is_pinned for q in group])
    low[pinned], high[pinned] = 0, 0
    bad = ~torch.isfinite(high - low)
    if bool(bad.any()):
        names = [group[i].name for i in bad.nonzero().flatten().tolist()]
        finite = bool(torch.isfinite(low[bad]).all() and torch.isfinite(high[bad]).all())
        what = (
            "wider than float32 can hold; look for values that are masks or an overflow"
            if finite
            else "not finite (nan or infinity in the data)"
        )
        raise CalibrationError(f"{listed(names, 3)}: the observed range is {what}")


def _parts(quantizers: Sequence[Quantizer]) -> list[list[Quantizer]]:
    """Those with equally many points together, as many as are worked on at once."""
    alike: dict[tuple[int, bool, int], list[Quantizer]] = defaultdict(list)
    for q in quantizers:
        alike[len(q.observer.sample), q.observer.is_complete, q.observer.tails.shape[1]].append(q)
    at_once = {key: max(1, _POINTS_AT_ONCE // max(1, key[0])) for key in alike}
    return [
        group[i : i + at_once[key]]
        for key, group in alike.items()
        for i in range(0, len(group), at_once[key])
    ]


def _points(part: Sequence[Quantizer]) -> Points:
    """The sampled values of several quantizers in ascending order, each with the number of values that it stands for."""
    samples = torch.from_numpy(
        np.sort(torch.stack([q.observer.sample.cpu() for q in part]).numpy(), axis=1)
    )
    if part[0].observer.is_complete:
        places = samples.double()
        return Points(running_sums(torch.ones_like(places), places), places)
    bounds = torch.stack([q.observer.bounds.cpu() for q in part]).unsqueeze(2)  # [quantizers, 2, 1]
    far = torch.from_numpy(
        np.sort(torch.stack([q.observer.tails.cpu() for q in part]).numpy(), axis=2)
    )
    # what lies on the wrong side of a bound is known from the other side: it moves to the bound, and counts nothing
    tails, tail_weights = far.maximum(bounds), (far >= bounds).double()
    first, last = -bounds[:, 0], bounds[:, 1].contiguous()
    inside = slice(tails.shape[2], tails.shape[2] + samples.shape[1])
    begin, end = torch.searchsorted(samples, first), torch.searchsorted(samples, last, right=True)
    missing = torch.tensor([q.observer.count for q in part]) - tail_weights.sum((1, 2))
    places = torch.empty(len(part), samples.shape[1] + 2 * tails.shape[2], dtype=torch.float64)
    weights = torch.empty_like(places)
    places[:, : inside.start], weights[:, : inside.start] = (
        -tails[:, 0].flip(1),
        tail_weights[:, 0].flip(1),
    )
    places[:, inside.stop :], weights[:, inside.stop :] = tails[:, 1], tail_weights[:, 1]
    places[:, inside], weights[:, inside] = (
        samples.clamp_(first, last),
        missing.clamp(min=0).unsqueeze(1) / (end - begin).clamp(min=1),
    )
    for row, ends in zip(weights[:, inside], torch.cat([begin, end], 1).tolist(), strict=True):
        row[: ends[0]], row[ends[1] :] = 0, 0
    return Points(running_sums(weights, places), places)


def _search(
    points: Points, low: Tensor, high: Tensor, scheme: Scheme, estimator: Estimator
) -> tuple[Tensor, Tensor]:
    """The range that the estimator chooses for each."""
    if estimator.name == "percentile":
        first, last = points.percentile_range(estimator.percentile)
        return torch.maximum(low, first), torch.minimum(high, last)
    scale, offset = least_error_of_points(points, low, high, scheme, estimator.gamma)
    return scale * offset, scale * (offset + scheme.steps)
