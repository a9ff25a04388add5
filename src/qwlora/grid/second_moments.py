"""Second moments of a layer's input and of the gradient at its output, for gptq and qera.

    R = sum_t w_t x_t x_t^T / sum_t w_t          [in, in]
    G = sum_t g_t g_t^T / sum_t 1                [out, out]

`w_t` is how much token t matters (1 by default), `g_t` how much each output matters
(`quantize/layer_statistics.py`). An error E of the weight costs about `tr(G E R E^T)`.
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from qwlora.errors import CalibrationError, SourceError
from qwlora.system.atomic import read_tensors, write_tensors
from qwlora.system.device import CPU, moved

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
        # first, because the gradient of an input that is not finite is not either
        if not bool(torch.isfinite(rows.square().sum())):
            raise CalibrationError("the layer's input, or its square, holds nan or infinity")
        if not bool(torch.isfinite(w.sum() + scaled.square().sum())):
            raise CalibrationError(
                "the gradient of the layer's output, or its square, holds nan or infinity"
            )
        self.total.addmm_(scaled.T, scaled)
        self.weight += float(w.sum())

    @property
    def matrix(self) -> Float[Tensor, "in in"]:
        """R."""
        if self.total is None:
            raise CalibrationError("no data was observed")
        return _symmetric(self.total / self.weight if self.weight else self.total)


class LayerMoments(NamedTuple):
    """R of a layer's input, and G of the gradient at its output; None stands for the identity."""

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


def _symmetric(upper: Tensor) -> Tensor:
    # a file keeps one triangle, so a moment in memory must not depend on the other one either
    return upper.triu() + upper.triu(1).T


def _from_triangle(triangle: Float[Tensor, " entries"]) -> Float[Tensor, "n n"]:
    size = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    matrix = triangle.new_zeros(size, size)
    matrix[tuple(torch.triu_indices(size, size))] = triangle
    return _symmetric(matrix)


class MomentStore(UserDict[str, LayerMoments]):
    """R and G of many layers by canonical module path. In memory, or in a folder with one file per
    layer."""

    def __init__(self, folder: Path | None = None):
        super().__init__()
        self.folder = folder
        files = sorted(folder.glob("*.safetensors")) if folder is not None else ()
        self.data: dict[str, Any] = {file.stem: file for file in files}  # or a moment, by layer

    @classmethod
    def resumed(cls, folder: Path) -> MomentStore:
        """The moments of an unfinished job; files that are damaged or misnamed are deleted."""
        for file in sorted(folder.glob("*.safetensors")):
            try:
                good = read_tensors(file)[1].get("layer") == file.stem
            except (OSError, SafetensorError, ValueError):
                good = False
            if not good:
                file.unlink(missing_ok=True)
        return cls(folder)

    def __setitem__(self, layer: str, moment: LayerMoments) -> None:
        # all layers together are large for a GPU's memory
        self.data[layer] = moment = moved(moment, CPU)
        if self.folder is not None:
            self.data[layer] = file = self.folder / f"{layer}.safetensors"
            triangles = {
                name: matrix[tuple(torch.triu_indices(*matrix.shape))]
                for name, matrix in moment._asdict().items()
                if matrix is not None
            }
            write_tensors(file, triangles, {"layer": layer})

    def __getitem__(self, layer: str) -> LayerMoments:
        stored = self.data[layer]
        if isinstance(stored, LayerMoments):
            return stored
        try:
            tensors = read_tensors(stored)[0]
        except (OSError, SafetensorError, ValueError) as error:
            raise SourceError(
                f"the moments in {str(stored)!r} cannot be read ({error}); quantize again"
            ) from error
        return LayerMoments(**{n: _from_triangle(triangle) for n, triangle in tensors.items()})

    def __repr__(self) -> str:
        where = "memory" if self.folder is None else repr(str(self.folder))
        return f"MomentStore of {len(self)} layers in {where}"
