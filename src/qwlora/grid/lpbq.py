"""Low-power blocks (AIMET's LPBQ): block scales that are small integers times one float scale for
each row.

    row scale    r = max over the row's blocks of scale / 2^b
    integers     n = clamp(round_half_even(scale / r), 1, 2^b)
    scale        n * r

with `b` the granularity's `scale_bitwidth`. A row's largest block has `n = 2^b`, which gives `r`
back from the scales alone, so an encoding stores nothing more.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwlora.errors import GridError
from qwlora.grid.scheme import Lpbq, Scheme


def to_integer_scales(
    scale: Float[Tensor, "*rows blocks"], scheme: Scheme
) -> Float[Tensor, "*rows blocks"]:
    """The nearest scales that are an integer times their row's scale; AIMET's rule."""
    row, integers = _factors(scale, _scale_bitwidth(scheme))
    return integers * row


def split_scales(
    scale: Float[Tensor, "*rows blocks"], scheme: Scheme
) -> tuple[Float[Tensor, "*rows"], Int[Tensor, "*rows blocks"]]:
    """(row scales, integers) of low-power scales, whose product they are bit for bit.

    Raises:
        GridError: the scheme has other blocks, or the scales are no such products.
    """
    row, integers = _factors(scale, _scale_bitwidth(scheme))
    if not torch.equal(integers * row, scale):
        wrong = int((integers * row != scale).sum())
        raise GridError(
            f"{wrong} of {scale.numel()} block scales are not an integer times their row's scale; "
            "pass them through to_integer_scales first"
        )
    return row.squeeze(-1), integers.to(torch.int32)


def _factors(scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    largest = 2**bits
    row = scale.amax(-1, keepdim=True) / largest
    return row, torch.div(scale, row).round_().clamp_(1, largest)


def _scale_bitwidth(scheme: Scheme) -> int:
    if not isinstance(scheme.granularity, Lpbq):
        raise GridError(f"{scheme}: only blocks with integer scales (Lpbq) have them")
    return scheme.granularity.scale_bitwidth
