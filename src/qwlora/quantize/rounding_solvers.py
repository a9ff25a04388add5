"""Solvers that look at the weight alone: an encoding, then round to nearest.

rtn      min-max range; AIMET's numbers
search   the encoding with the least squared error in each group
sqnr     the same, with clipped weights counted three times (AIMET's enhanced rule)
"""

from __future__ import annotations

from torch import Tensor

from qwlora.grid.encoding import Encoding
from qwlora.grid.min_max import measure
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.quantize.scale_search import search_scale


def solve_rtn(
    weight: Tensor, scheme: Scheme, moment: Tensor | None, settings: None
) -> tuple[QuantizedTensor, dict[str, float]]:
    """Min-max range."""
    return _rounded(weight, measure(weight, scheme))


def solve_search(
    weight: Tensor, scheme: Scheme, moment: Tensor | None, settings: None
) -> tuple[QuantizedTensor, dict[str, float]]:
    """The least squared error."""
    return _rounded(weight, search_scale(weight, scheme))


def solve_sqnr(
    weight: Tensor, scheme: Scheme, moment: Tensor | None, settings: None
) -> tuple[QuantizedTensor, dict[str, float]]:
    """The least squared error, with clipped weights counted three times."""
    return _rounded(weight, search_scale(weight, scheme, clipping_penalty=3.0))


def _rounded(weight: Tensor, encoding: Encoding) -> tuple[QuantizedTensor, dict[str, float]]:
    return QuantizedTensor(encoding.quantize(weight), encoding), {}
