"""Second moments of a layer's input and of the gradient at its output, for gptq and qera.

    R = sum_t w_t x_t x_t^T / sum_t w_t          [in, in]
    G = sum_t g_t g_t^T / sum_t 1                [out, out]

`w_t` is how much token t matters (1 by default), `g_t` how much each output matters
(`quantize/layer_statistics.py`). An error E of the weight costs about `tr(G E R E^T)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qwlora.errors import CalibrationError

_ROWS = 128  # of a moment, multiplied at once
_LEAST_DAMPING = 1e-6  # of a matrix that is not positive definite without any


class SecondMoment:
    """Running second moment of finite rows."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.weight = 0.0

    def update(
        self, x: Float[Tensor, "*tokens in"], weights: Float[Tensor, "*tokens"] | None = None
    ) -> None:
        """Add the rows of `x`."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        w = rows.new_ones(len(rows)) if weights is None else weights.detach().reshape(-1).float()
        if self.total is None:
            self.total = rows.new_zeros(rows.shape[-1], rows.shape[-1])
        scaled = rows * w.sqrt().unsqueeze(1)
        # checked first, because a non-finite input also has a non-finite gradient
        if not bool(torch.isfinite(rows.square().sum())):
            raise CalibrationError("the layer's input, or its square, holds nan or infinity")
        if not bool(torch.isfinite(w.sum() + scaled.square().sum())):
            raise CalibrationError(
                "the gradient of the layer's output, or its square, holds nan or infinity"
            )
        # `matrix` reads only blocks on and above the diagonal, which takes 0.6 times as long.
        for start in range(0, len(self.total), _ROWS):
            run = slice(start, start + _ROWS)
            self.total[run, start:].addmm_(scaled[:, run].T, scaled[:, start:])
        self.weight += float(w.sum())

    @property
    def matrix(self) -> Float[Tensor, "in in"]:
        """R."""
        if self.total is None:
            raise CalibrationError("no data was observed")
        upper = self.total / self.weight if self.weight else self.total
        # Exactly symmetric; the product rounded both triangles differently.
        return upper.triu() + upper.triu(1).T


class LayerMoments(NamedTuple):
    """Second moments R of a layer's input, and G of its output gradient (None: the identity)."""

    input: Float[Tensor, "in in"]
    output: Float[Tensor, "out out"] | None = None

    def __repr__(self) -> str:
        output = "identity" if self.output is None else list(self.output.shape)
        return f"LayerMoments(input {list(self.input.shape)}, output {output})"


def output_energy(
    matrix: Float[Tensor, "out in"], moment: Float[Tensor, "in in"] | None = None
) -> float:
    """`tr(M R M^T)`: mean square of `M x` for inputs with second moment R (default: the
    identity)."""
    weighted = matrix if moment is None else matrix @ moment
    # at least the smallest float, so that it can be a divisor
    return float((weighted * matrix).sum().clamp(min=torch.finfo(torch.float32).tiny))


def factor_damped(
    moment: Float[Tensor, "n n"],
    unit: float,
    damping: float,
    factor: Callable[[Tensor], Tensor | None],
) -> tuple[Float[Tensor, "n n"], Tensor, float]:
    """(M = moment + damping * unit * I, `factor(M)`, damping), the damping raised tenfold until
    `factor` returns something: a factorization of a matrix that must be positive definite."""
    while True:
        damped = moment.clone()
        damped.diagonal().add_(damping * unit)
        if (result := factor(damped)) is not None:
            return damped, result, damping
        damping = 10 * damping or _LEAST_DAMPING
