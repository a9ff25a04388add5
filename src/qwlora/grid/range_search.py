"""The grid with the least weighted squared error.

    error(scale, offset) = sum over values of  (x - x_hat)^2 * (gamma if x is clipped else 1)

First on a coarse net of grids: every hundredth of the symmetric scale; sixteenths of the asymmetric one with twenty places of zero, each cut to the observed
range. That is the net of AIMET's `SqnrEncodingAnalyzer`, so the choice is never worse than AIMET's on what is known of the data: all of it, or fine bins (see
`distribution.py`). Then in five nets around the best, each ten times finer than the one before, down to float32.

A grid is judged without touching every value. With its middles `b_j` between neighbouring steps, and v its last step,

    sum (x - x_hat)^2 = sum (x - v)^2 - 2 scale sum over j of G(b_j),        G(b) = sum over x < b of (b - x)

and G is read from running sums: one look-up a step, not one a value. The clipped values' share takes two look-ups; where it alone exceeds the error of a grid
that is known, the rest is not looked up.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qwlora.grid.scheme import Scheme
from qwlora.grid.value_distribution import Distribution, Points

_CELLS_AT_ONCE = (
    2**15
)  # look-ups held together: in a processor's cache, and below the size that torch divides among threads
_POINTS_AT_ONCE = 2**20
_FEW_STEPS = 31
_FINER = (1, 0.1, 0.01, 0.001, 0.0001)

Found = tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]
Grids = Float[Tensor, "groups candidates"]


def least_error_grid(
    seen: Distribution,
    low: Float[Tensor, " groups"],
    high: Float[Tensor, " groups"],
    scheme: Scheme,
    gamma: float,
) -> Found:
    """(scale, offset) of each group on its own; `low` and `high` are the lowest and highest values seen."""
    at_once = max(1, _POINTS_AT_ONCE // seen.remembered)
    found = []
    for first in range(0, len(low), at_once):
        groups = slice(first, first + at_once)
        found.append(
            _search(
                seen.points(groups, low[groups], high[groups]),
                low[groups].double(),
                high[groups].double(),
                scheme,
                gamma,
            )
        )
    scales, offsets = (torch.cat(numbers) for numbers in zip(*found, strict=True))
    return scales, offsets


def least_error_of_points(
    points: Points,
    low: Float[Tensor, " groups"],
    high: Float[Tensor, " groups"],
    scheme: Scheme,
    gamma: float,
) -> Found:
    """The same from weighted points, for thousands of groups: on the coarse net and one around its best, the error modelled where there are many steps.

        error = gamma * sum over clipped x of (x - x_hat)^2 + sum over |x| < scale / 2 of x^2 + count of the others * scale^2 / 12

    Up to 31 steps it is measured.
    """
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    smallest = min(torch.finfo(torch.float32).eps, 0.01 / scheme.steps)
    narrow = (high - low) / scheme.steps < smallest
    scale, offset = (
        _symmetric_net(low, high, scheme)
        if scheme.symmetric
        else _asymmetric_net(low, high, scheme)
    )
    judge = _modelled_errors if scheme.steps > _FEW_STEPS else _weighted_errors
    for spread in (0.01 if scheme.symmetric else 1 / 16, None):
        scale = scale.clamp(min=smallest)
        best = judge(points, scale, offset, scheme.steps, gamma).argmin(1, keepdim=True)
        scale, offset = scale.gather(1, best), offset.gather(1, best)
        if spread is not None:
            scale, offset = _around(scale, offset, spread, scheme)
    return _unless_narrow(narrow, smallest, low, scale.squeeze(1), offset.squeeze(1), scheme)


def _unless_narrow(
    narrow: Tensor, smallest: float, low: Tensor, scale: Tensor, offset: Tensor, scheme: Scheme
) -> Found:
    """What was found, but for ranges that are as good as zero: `encoding_from_range` says the same of them."""
    if not scheme.symmetric:
        offset = torch.where(narrow, torch.round(low / smallest), offset)
    return torch.where(narrow, smallest, scale).float(), offset.int()


def _modelled_errors(
    points: Points, scale: Grids, offset: Grids, steps: int, gamma: float
) -> Grids:
    clipped, inside = _clipped_error(points, scale, offset, steps, gamma)
    near = points.below(torch.cat([-scale / 2, scale / 2], 1)).expand(3, -1, -1)
    below, not_above = points.sums.gather(2, near).split(scale.shape[1], 2)
    count, _, squares = not_above - below
    return clipped + squares + (inside - count).clamp_(min=0) * scale.square() / 12


def _weighted_errors(
    points: Points, scale: Grids, offset: Grids, steps: int, gamma: float
) -> Grids:
    clipped, _ = _clipped_error(points, scale, offset, steps, gamma)
    at_once = max(1, _CELLS_AT_ONCE // (steps * len(scale)))
    parts = (
        _errors_by_sums(points, s, o, steps)
        for s, o in zip(scale.split(at_once, 1), offset.split(at_once, 1), strict=True)
    )
    return torch.cat(list(parts), 1) + clipped * ((gamma - 1) / gamma)


def _search(points: Points, low: Tensor, high: Tensor, scheme: Scheme, gamma: float) -> Found:
    low, high = low.clamp(max=0), high.clamp(min=0)
    smallest = min(torch.finfo(torch.float32).eps, 0.01 / scheme.steps)
    narrow = (high - low) / scheme.steps < smallest
    scale, offset = (
        _symmetric_net(low, high, scheme)
        if scheme.symmetric
        else _asymmetric_net(low, high, scheme)
    )
    spreads = [finer * (0.01 if scheme.symmetric else 1 / 16) for finer in _FINER]
    for spread in (*spreads, None):
        # judged as it will be stored: a value on the border of being clipped weighs gamma, or 1, by the last bit
        scale = scale.clamp(min=smallest).float().double()
        best = _best(points, scale, offset, scheme.steps, gamma, prune=spread == spreads[0])
        scale, offset = scale.gather(1, best), offset.gather(1, best)
        if spread is not None:
            scale, offset = _around(scale, offset, spread, scheme)
    return _unless_narrow(narrow, smallest, low, scale.squeeze(1), offset.squeeze(1), scheme)


def _symmetric_net(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Grids, Grids]:
    widest = 2 * torch.maximum(high, -low).unsqueeze(1) / scheme.steps
    hundredths = torch.arange(1, 102, device=low.device, dtype=torch.float64) / 100
    # at 2 bits the widest grid ends where clipping begins; which side of that a rounded scale falls on is chance, so both are there
    scale = torch.cat([hundredths, hundredths * (1 + 2**-22)]) * widest
    return scale, torch.full_like(scale, scheme.symmetric_offset)


def _asymmetric_net(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Grids, Grids]:
    steps = scheme.steps
    widest = ((high - low) / steps).clamp(min=torch.finfo(torch.float32).tiny).view(-1, 1, 1)
    observed = torch.round(low.view(-1, 1, 1) / widest)
    scale = torch.arange(1, 18, device=low.device).view(1, -1, 1) / 16 * widest
    places = torch.linspace(
        -steps, 0, min(steps + 1, 20), device=low.device, dtype=torch.float64
    ).round()
    offset = torch.cat([places.expand(len(low), 1, -1), observed], 2)
    first = torch.maximum(scale * offset, observed * widest)
    last = torch.minimum(scale * (offset + steps), (observed + steps) * widest)
    cut = ((last - first) / steps).clamp(min=torch.finfo(torch.float32).tiny)
    return cut.flatten(1), torch.round(first / cut).clamp(-steps, 0).flatten(1)


def _around(scale: Grids, offset: Grids, spread: float, scheme: Scheme) -> tuple[Grids, Grids]:
    """A net around one grid for each group, the grid being among it."""
    scales = scale * torch.linspace(
        1 - spread, 1 + spread, 21, device=scale.device, dtype=torch.float64
    )
    if scheme.symmetric:
        return scales, offset.expand_as(scales)
    reach = max(1, round(scheme.steps * spread / 2))
    moves = torch.linspace(
        -reach, reach, 9 if reach > 1 else 3, device=scale.device, dtype=torch.float64
    ).round()
    offsets = (offset + moves).clamp(-scheme.steps, 0)
    shape = len(scale), scales.shape[1], offsets.shape[1]
    return scales.unsqueeze(2).expand(shape).flatten(1), offsets.unsqueeze(1).expand(shape).flatten(
        1
    )


def _best(
    points: Points, scale: Grids, offset: Grids, steps: int, gamma: float, prune: bool
) -> Int64[Tensor, "groups 1"]:
    """The index of the best grid; with `prune`, grids whose clipped values alone cost more than a grid that is known are not judged further."""
    clipped, inside = _clipped_error(points, scale, offset, steps, gamma)
    if points.bins is not None and 4 * steps > points.count:
        # in steps as narrow as bins (16 bits), bins cannot tell where a value lies; anywhere in the step, then
        return (clipped + inside * scale.square() / 12).argmin(1, keepdim=True)
    if not prune:
        return _errors(points, scale, offset, clipped, steps, gamma).argmin(1, keepdim=True)

    def errors_at(columns: Tensor) -> Grids:
        return _errors(
            points,
            scale.gather(1, columns),
            offset.gather(1, columns),
            clipped.gather(1, columns),
            steps,
            gamma,
        )

    known = errors_at((clipped + inside * scale.square() / 12).argmin(1, keepdim=True))
    order = clipped.argsort(1)[:, : int((clipped <= known).sum(1).max())]
    return order.gather(1, errors_at(order).argmin(1, keepdim=True))


def _clipped_error(
    points: Points, scale: Grids, offset: Grids, steps: int, gamma: float
) -> tuple[Grids, Grids]:
    """The error of the clipped values, `gamma` in it; and how many values are not clipped."""
    first, last = offset * scale, (offset + steps) * scale
    below, above = points.outside(first - scale / 2, last + scale / 2)
    error = _squares(below, first) + _squares(above, last)
    return gamma * error.clamp_(min=0), points.sums[0, :, -1:] - below[0] - above[0]


def _squares(moments: Float[Tensor, "3 groups candidates"], v: Grids) -> Grids:
    """Sum of (x - v)^2 from count, sum and sum of squares."""
    count, total, squares = moments
    return squares - 2 * v * total + v.square() * count


def _errors(
    points: Points, scale: Grids, offset: Grids, clipped: Grids, steps: int, gamma: float
) -> Grids:
    """The error of each grid, in the cheaper of two ways; `clipped` is the clipped values' part of it."""
    by_values = 4 * steps > points.count
    judge, cells = (_errors_value_by_value, points.count) if by_values else (_errors_by_sums, steps)
    at_once = max(1, _CELLS_AT_ONCE // (cells * len(scale)))
    parts = (
        judge(points, s, o, steps)
        for s, o in zip(scale.split(at_once, 1), offset.split(at_once, 1), strict=True)
    )
    return torch.cat(list(parts), 1) + clipped * ((gamma - 1) / gamma)


def _errors_by_sums(points: Points, scale: Grids, offset: Grids, steps: int) -> Grids:
    step = torch.arange(steps, device=scale.device, dtype=torch.float64) + 0.5
    middles = ((offset.unsqueeze(2) + step) * scale.unsqueeze(2)).flatten(1)
    place = points.below(middles)
    count, total, _ = points.sums
    lifted = (
        middles.mul_(count.gather(1, place))
        .sub_(total.gather(1, place))
        .view(*scale.shape, steps)
        .sum(2)
    )
    return _squares(points.sums[:, :, -1:], (offset + steps) * scale) - 2 * scale * lifted


def _errors_value_by_value(points: Points, scale: Grids, offset: Grids, steps: int) -> Grids:
    assert points.places is not None
    s, first, x = scale.unsqueeze(2), offset.unsqueeze(2), points.places.unsqueeze(1)
    nearest = torch.div(x, s).round_()
    return (
        torch.minimum(torch.maximum(nearest, first), first + steps).mul_(s).sub_(x).square_().sum(2)
    )
