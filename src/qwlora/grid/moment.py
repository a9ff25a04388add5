"""Second moments of a layer's input, the statistics that data-aware solvers and starts share.

    R = sum_t w_t x_t x_t^T / sum_t w_t          [in, in]

`w_t` says how much token t matters; all alike unless given (`base/observe.py` gives them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwlora.errors import CalibrationError, SourceError


class SecondMoment:
    """Running R of one input; one pass, mergeable.

    Raises:
        CalibrationError: an input is nan or infinite, has another width than before; or `matrix` before any data.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.weight = 0.0
        self.tokens = 0

    def update(self, x: Float[Tensor, "*tokens in"], weights: Float[Tensor, "*tokens"] | None = None) -> None:
        """Take in the rows of `x`."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        w = rows.new_ones(len(rows)) if weights is None else weights.detach().reshape(-1).float()
        if self.total is None:
            self.total = rows.new_zeros(rows.shape[-1], rows.shape[-1])
        if self.total.shape[0] != rows.shape[-1]:
            raise CalibrationError(f"the layer's input has width {rows.shape[-1]} where it had {self.total.shape[0]} before")
        if not bool(torch.isfinite(w.sum())):
            raise CalibrationError("the gradient of the layer's output holds nan or infinity (or overflows when squared)")
        scaled = rows * w.sqrt().unsqueeze(1)
        if not bool(torch.isfinite(scaled.square().sum())):
            raise CalibrationError("the layer's input holds nan or infinity (or overflows when squared)")
        self.total.addmm_(scaled.T, scaled)
        self.weight += float(w.sum())
        self.tokens += len(rows)

    def merge(self, other: SecondMoment) -> None:
        """Take in what `other` saw."""
        if other.total is None:
            return
        if self.total is None:
            self.total = torch.zeros_like(other.total)
        if self.total.shape != other.total.shape:
            raise CalibrationError(f"moments of widths {self.total.shape[0]} and {other.total.shape[0]} are not of one layer")
        self.total += other.total
        self.weight += other.weight
        self.tokens += other.tokens

    @property
    def matrix(self) -> Float[Tensor, "in in"]:
        """R."""
        if self.total is None:
            raise CalibrationError("no data was observed")
        return _symmetric(self.total / self.weight if self.weight else self.total)


def output_energy(matrix: Float[Tensor, "out in"], moment: Float[Tensor, "in in"] | None = None) -> float:
    """`tr(M R M^T)`, the mean square of what a matrix makes of inputs with moment R (`R = 1` unless given); never quite zero, so that it divides."""
    weighted = matrix if moment is None else matrix @ moment
    return float((weighted * matrix).sum().clamp(min=torch.finfo(torch.float32).tiny))


def _symmetric(upper: Tensor) -> Tensor:
    """The matrix whose upper triangle is that of `upper`."""
    return upper.triu() + upper.triu(1).T


class Moments(Mapping[str, Tensor]):
    """R of many layers by canonical module path, in memory, or in a folder with one file a layer.

    Raises:
        SourceError: a file of the folder cannot be read.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._home: dict[str, Tensor | Path] = {}
        for file in sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else ():
            try:
                with safe_open(file, "pt") as opened:
                    self._home[opened.metadata()["layer"]] = file
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise SourceError(f"the moments in {str(file)!r} cannot be read ({error}); quantize again") from error

    def put(self, layer: str, matrix: Float[Tensor, "in in"]) -> None:
        """Keep `matrix` for `layer`."""
        if self.folder is None:
            self._home[layer] = matrix
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file, scratch = self.folder / f"{layer}.safetensors", self.folder / f".{layer}.part"
        triangle = matrix[tuple(torch.triu_indices(*matrix.shape))]
        save_file({"triangle": triangle.contiguous()}, scratch, metadata={"layer": layer})
        scratch.replace(file)
        self._home[layer] = file

    def __getitem__(self, layer: str) -> Float[Tensor, "in in"]:
        home = self._home[layer]
        if isinstance(home, Tensor):
            return home
        triangle = load_file(home)["triangle"]
        size = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
        matrix = triangle.new_zeros(size, size)
        matrix[tuple(torch.triu_indices(size, size))] = triangle
        return _symmetric(matrix)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)
