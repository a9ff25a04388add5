"""Solvers that need no data: find an encoding from the weight, then round to nearest.

    rtn       min-max range; AIMET's numbers
    search    the encoding with the least squared error in each group
    sqnr      the same, with clipped weights counted three times (AIMET's enhanced rule)

The search, which gptq uses too, finds for each group of weights w

    the scale and offset with the least    sum_j h_j c_j (w_j - w_hat_j)^2

`h_j >= 0` is the importance of input j; `c_j` is `clipping_penalty` (3 for sqnr) where the grid
clips w_j, else 1.

Candidates are fractions of the min-max range down to 0.3, and smaller ones as long as the error of
some group falls. The best scale for the resulting codes comes next, `sum h w n / sum h n^2` with
`n = q + offset`, then the neighboring offsets of an asymmetric grid. Signed blocks try both signs.
Block scales are rounded to float16 if they are in the range of its full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from qwlora.grid.encoding import (
    Encoding,
    QuantizedTensor,
    encoding_from_range,
    measure,
    rows_of_groups,
)
from qwlora.grid.scheme import PerChannel, Scheme

if TYPE_CHECKING:
    from qwlora.quantize.solvers import Solve

_FRACTIONS = tuple(torch.linspace(1.0, 0.3, 15).tolist())
_COARSE = (1.0, 0.88, 0.76)
_NARROWEST = 0.01
_REFITS = 3
_HALF_NORMAL = torch.finfo(torch.float16).smallest_normal


def search_scale(
    weight: Float[Tensor, "*rows in"],
    scheme: Scheme,
    importance: Float[Tensor, " in"] | None = None,
    clipping_penalty: float = 1.0,
    coarse: bool = False,
) -> Encoding:
    """The encoding of `weight` under `scheme`; rows and blocks along the last axis.

    Args:
        importance: h, one per input; all 1 by default.
        coarse: try three fractions and refit the scale once, which is enough if scales are improved
            afterwards.
    """
    shape = scheme.scale_shape(tuple(weight.shape))
    x = rows_of_groups(weight.float(), scheme)
    h = None if importance is None else rows_of_groups(importance.expand_as(weight), scheme)
    flat = Scheme(scheme.bitwidth, scheme.symmetric, PerChannel(0))
    low, high = x.amin(-1), x.amax(-1)
    best = _Best(x, h, flat, scheme.granularity.is_free, clipping_penalty)

    def offer(fraction: float) -> None:
        candidate = encoding_from_range(low * fraction, high * fraction, flat)
        best.offer(candidate.scale, candidate.offset)
        if scheme.granularity.is_signed:
            turned = encoding_from_range(-high * fraction, -low * fraction, flat)
            best.offer(-turned.scale, turned.offset)

    for fraction in _COARSE if coarse else _FRACTIONS:
        offer(fraction)
    improved = not coarse
    # With one grid per tensor and an outlier among a million values, a tenth of the range is best.
    # A search down to 0.3 has up to 2.28 times AIMET's error (docs/log/solvers.md).
    while improved and fraction > _NARROWEST:
        fraction, before = 0.9 * fraction, best.error
        offer(fraction)
        improved = bool((best.error < before).any())
    for _ in range(1 if coarse else _REFITS):
        best.offer(best.refitted_scale(), best.offset)
        for shift in () if scheme.symmetric else (-1, 1):
            offset = (best.offset + shift).clamp(-scheme.steps, 0)
            best.offer(best.scale, offset)
    scale = scheme.granularity.nearest(best.scale.view(shape))
    return Encoding(scheme, scale, best.offset.view(shape))


def storable_scale(scale: Float[Tensor, "*groups"]) -> Float[Tensor, "*groups"]:
    """The nearest scales with float16's full precision; scales outside its range do not change."""
    half = scale.half().float()
    return torch.where((scale.abs() >= _HALF_NORMAL) & torch.isfinite(half), half, scale)


@dataclass
class _Best:
    """The best grid so far of each row of `x` [groups, n]."""

    x: Tensor
    importance: Tensor | None
    scheme: Scheme
    storable: bool
    clipping_penalty: float

    def __post_init__(self) -> None:
        self.error = self.x.new_full(self.x.shape[:1], torch.inf)
        self.scale = torch.ones_like(self.error)
        self.offset = torch.zeros_like(self.error, dtype=torch.int32)

    def offer(self, scale: Tensor, offset: Tensor) -> None:
        if self.storable:
            scale = storable_scale(scale)
        values = self._steps(scale, offset).mul_(scale.unsqueeze(1)).sub_(self.x).square_()
        if self.importance is not None:
            values.mul_(self.importance)
        if self.clipping_penalty != 1:
            steps, low = torch.div(self.x, scale.unsqueeze(1)).round_(), offset.unsqueeze(1)
            clipped = (steps < low) | (steps > low + self.scheme.steps)
            values = torch.where(clipped, values * self.clipping_penalty, values)
        error = values.sum(-1)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.offset = torch.where(better, offset, self.offset)

    def refitted_scale(self) -> Tensor:
        """The best scale for the codes of the best grid."""
        steps = self._steps(self.scale, self.offset)
        weighted = steps if self.importance is None else steps * self.importance
        above, below = (weighted * self.x).sum(-1), (weighted * steps).sum(-1)
        fitted = above / below
        is_usable = torch.isfinite(fitted) & (fitted * self.scale > 0)
        return torch.where(is_usable, fitted, self.scale)

    def _steps(self, scale: Tensor, offset: Tensor) -> Tensor:
        low = offset.to(self.x.dtype).unsqueeze(1)
        steps = torch.div(self.x, scale.unsqueeze(1)).round_()
        return torch.minimum(torch.maximum(steps, low), low + self.scheme.steps)


def _solver(encode: Callable[[Tensor, Scheme], Encoding]) -> Solve:

    def solve(
        weight: Tensor, scheme: Scheme, moment: Tensor | None, settings: None
    ) -> tuple[QuantizedTensor, dict[str, float]]:
        encoding = encode(weight, scheme)
        return QuantizedTensor(encoding.quantize(weight), encoding), {}

    return solve


solve_rtn, solve_search = _solver(measure), _solver(search_scale)
solve_sqnr = _solver(partial(search_scale, clipping_penalty=3.0))
