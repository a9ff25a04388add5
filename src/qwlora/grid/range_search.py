"""The range with the least weighted squared error, found on a histogram.

    error(scale, offset) = sum over bins of  count * (centre - fake_quantize(centre))^2 * (gamma if any of the bin is clipped else 1)

First on a coarse net of grids: every hundredth of the symmetric scale; sixteenths of the asymmetric one with twenty places of zero, each cut to the observed
range (AIMET's net, and so never worse than its choice on the same counts). Then in two finer nets around the best.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qwlora.grid.histogram import Histogram
from qwlora.grid.scheme import Scheme

_CELLS_AT_ONCE = 2**22  # candidates times bins held in memory together


def least_error_range(
    histogram: Histogram, low: Float[Tensor, " groups"], high: Float[Tensor, " groups"], scheme: Scheme, gamma: float
) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
    """(low, high) for `encoding_from_range`, of each group on its own."""
    centres, widths = histogram.centres(), histogram.widths().tolist()
    found = [_search(histogram.counts[g], centres[g], widths[g], float(low[g]), float(high[g]), scheme, gamma) for g in range(len(low))]
    lows, highs = zip(*found, strict=True)
    return torch.tensor(lows, device=low.device), torch.tensor(highs, device=low.device)


def _search(counts: Tensor, centres: Tensor, width: float, low: float, high: float, scheme: Scheme, gamma: float) -> tuple[float, float]:
    low, high = min(low, 0.0), max(high, 0.0)
    smallest = min(torch.finfo(torch.float32).eps, 0.01 / scheme.steps)
    if high - low < smallest * scheme.steps:
        return low, high
    unit = max(high, -low)  # in which nothing below overflows or underflows
    low, high = low / unit, high / unit
    kept = counts > 0
    # the outermost bins reach past the data; what is in them is not past the ends
    counts, centres = counts[kept].float(), centres[kept] / unit
    outer = (centres + centres.sign() * (width / unit / 2)).clamp(low, high)
    centres = centres.clamp(low, high)
    scale, offset = _symmetric_net(low, high, scheme, centres) if scheme.symmetric else _asymmetric_net(low, high, scheme, centres)
    spread = 0.01 if scheme.symmetric else 1 / 16
    for finer in (1.0, 0.1, None):
        scale = scale.clamp(min=smallest / unit)
        best = int(_errors(counts, centres, outer, scale, offset, scheme.steps, gamma).argmin())
        if finer is None:
            break
        scale, offset = _around(scale[best], offset[best], spread * finer, scheme)
    return float(offset[best] * scale[best]) * unit, float((offset[best] + scheme.steps) * scale[best]) * unit


def _symmetric_net(low: float, high: float, scheme: Scheme, like: Tensor) -> tuple[Tensor, Tensor]:
    widest = 2 * max(high, -low) / scheme.steps
    scale = torch.arange(1, 102, device=like.device) / 100 * widest
    return scale, torch.full_like(scale, scheme.symmetric_offset)


def _asymmetric_net(low: float, high: float, scheme: Scheme, like: Tensor) -> tuple[Tensor, Tensor]:
    steps = scheme.steps
    widest = (high - low) / steps
    observed = round(low / widest)
    scale = torch.arange(1, 18, device=like.device).unsqueeze(1) / 16 * widest
    places = min(steps + 1, 20)
    offset = torch.linspace(-steps, 0, places, device=like.device).round()
    offset = torch.cat([offset, offset.new_tensor([observed])])
    first = (scale * offset).clamp(min=observed * widest)
    last = (scale * (offset + steps)).clamp(max=(observed + steps) * widest)
    cut = ((last - first) / steps).clamp(min=torch.finfo(torch.float32).tiny)
    return cut.flatten(), torch.round(first / cut).clamp(-steps, 0).flatten()


def _around(scale: Tensor, offset: Tensor, spread: float, scheme: Scheme) -> tuple[Tensor, Tensor]:
    scales = scale * torch.linspace(1 - spread, 1 + spread, 21, device=scale.device)
    if scheme.symmetric:
        return scales, offset.expand(21)
    reach = max(2, round(scheme.steps * spread / 2))
    offsets = (offset + torch.linspace(-reach, reach, 9, device=scale.device).round()).clamp(-scheme.steps, 0)
    grid = torch.cartesian_prod(scales, offsets)
    return grid[:, 0], grid[:, 1]


def _errors(counts: Tensor, centres: Tensor, outer: Tensor, scale: Tensor, offset: Tensor, steps: int, gamma: float) -> Tensor:
    at_once = max(1, _CELLS_AT_ONCE // max(1, len(centres)))
    found = []
    for s, o in zip(scale.unsqueeze(1).split(at_once), offset.unsqueeze(1).split(at_once), strict=True):
        nearest = torch.minimum(torch.maximum(torch.div(centres, s).round_(), o), o + steps)
        error = (nearest * s).sub_(centres).square_()
        if gamma != 1:
            outermost = torch.div(outer, s).round_()
            error = torch.where((outermost < o) | (outermost > o + steps), gamma * error, error)
        found.append(error @ counts)
    return torch.cat(found)
