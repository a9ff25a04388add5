"""GPTQ: round a weight column by column, and let the columns that are still float compensate the
error (Frantar et al. 2022, https://arxiv.org/abs/2210.17323).

    minimize   tr((W - W_hat) H (W - W_hat)^T)
               H = R + damping * mean(diag R) * I,    R = E[w x x^T]  (grid/second_moments.py)
    column i   e = (w_i - w_hat_i) / U_ii;    w_j -= e U_ij for j > i
               H^-1 = U^T U,  U upper triangular

The updates of a run of columns reach later columns in one matrix product. Each scale is the one
with the least weighted error (`scale_search.py`)

    sum_i (w_i - w_hat_i)^2 / U_ii^2

that is, with the share that column i's error has in the total once later columns compensate it.

    blocks                              when the first column of the block is reached, from the
                                        weights as they are then
    tensor, channel, LPBQ, and all      before any column is rounded
    granularities in activation order

With `activation_order` columns are visited in the order of falling diag R. A column that no input
reached (`R_ii = 0`) is rounded to nearest. If H is not positive definite in float32, the damping is
raised tenfold until it is; the report says which damping was used.

Matrices are transposed here, [in, out], so that a column of the weight is contiguous. Scales and
offsets are rows for runs of columns that share them: [1, out] per channel, [in / size, out] in
blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qwlora.errors import CalibrationError, GridError
from qwlora.grid.encoding import Encoding
from qwlora.grid.min_max import measure
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Blocks, PerBlock, PerChannel, PerTensor, Scheme
from qwlora.grid.second_moments import factor_damped, output_energy
from qwlora.quantize.scale_search import search_scale, storable_scale

_RUN = 32  # columns between two updates of all that follow


@dataclass(frozen=True)
class GptqSettings:
    """Settings of GPTQ.

    Args:
        damping: added to the diagonal of R, as a share of its mean.
        activation_order: quantize the columns with the largest inputs first; scales are then chosen
            before any column is rounded.
        sweeps: passes of coordinate descent afterwards; each improves codes and scales one at a
            time (see `_Refinement`).
    """

    damping: float = 0.01
    activation_order: bool = False
    sweeps: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.damping < math.inf:
            raise GridError(f"damping {self.damping} is not a finite number of at least 0")
        if self.sweeps < 0:
            raise GridError(f"sweeps is {self.sweeps}; it must be at least 0")


def solve_gptq(
    weight: Tensor, scheme: Scheme, moment: Tensor | None, settings: GptqSettings | None = None
) -> tuple[QuantizedTensor, dict[str, float]]:
    """`gptq` as a registered solver: codes and encoding of `weight` [out, in] for inputs with the
    second moment `moment` [in, in]; the report's `error` and `damping`.
    """
    if moment is None:
        raise CalibrationError(
            "no calibration data reached this layer, or its output changes nothing. Add a rule for "
            "it: solver: search, or keep: float."
        )
    settings = settings or GptqSettings()
    weight, moment = weight.detach().float(), moment.float()
    columns = weight.shape[1]
    if moment.shape != (columns, columns):
        raise GridError(
            f"a weight with {columns} inputs needs a moment of shape {[columns, columns]}, not "
            f"{list(moment.shape)}"
        )
    if not bool(torch.isfinite(weight).all() and torch.isfinite(moment).all()):
        raise CalibrationError("the weight or the moment of its input holds nan or infinity")
    scheme.scale_shape(tuple(weight.shape))
    order = torch.arange(columns, device=weight.device)
    if settings.activation_order:
        order = torch.argsort(moment.diagonal(), descending=True)
    hessian, upper, damping = _factor(moment, settings.damping, order)
    result = _Rounding(weight, upper, order, scheme, settings.activation_order).run_columns()
    if settings.sweeps:
        refinement = _Refinement(weight, hessian, result)
        for _ in range(settings.sweeps):
            refinement.sweep()
        result = refinement.result()
    error = output_energy(weight - result.dequantize(), moment) / output_energy(weight, moment)
    return result, {"error": error, "damping": damping}


def _factor(moment: Tensor, damping: float, order: Tensor) -> tuple[Tensor, Tensor, float]:
    """(H, U of its rows and columns in `order`, damping used)."""

    def factor(damped: Tensor) -> Tensor | None:
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order])
        if int(failed):
            return None
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        return None if int(failed) else upper

    mean = float(moment.diagonal().mean()) or 1.0
    hessian = moment.clone()
    hessian.diagonal()[moment.diagonal() <= 0] += mean
    return factor_damped(hessian, mean, damping, factor)


class _Grid:
    """The scales and offsets of a weight [out, in] by runs of columns, which `steps`, the codes
    plus offset, are rounded to.
    """

    def __init__(self, encoding: Encoding, columns: int):
        self.encoding, self.scheme = encoding, encoding.scheme
        self.run = _columns_of_a_scale(self.scheme)
        self.size = self.run or columns
        self.scale = _rows(encoding.scale, self.scheme)
        self.offset = _rows(encoding.offset.float(), self.scheme)
        self.row_of_column = torch.arange(columns, device=encoding.scale.device) // self.size

    def quantized(self, steps: Tensor) -> QuantizedTensor:
        scale, offset = (
            rows.T.reshape(self.encoding.scale.shape).contiguous()
            for rows in (self.scale, self.offset.int())
        )
        codes = (steps - self.offset[self.row_of_column]).to(torch.uint8).T.contiguous()
        return QuantizedTensor(codes, Encoding(self.scheme, scale, offset))


def _columns_of_a_scale(scheme: Scheme) -> int | None:
    """Number of consecutive columns that share their scales; None if all do."""
    match scheme.granularity:
        case Blocks(size):
            return size
        case PerChannel(axis) if axis % 2:
            return 1
        case _:
            return None


def _rows(numbers: Tensor, scheme: Scheme) -> Tensor:
    """A scale or offset as [runs of columns, out], or [..., 1] if all outputs share it."""
    match scheme.granularity:
        case PerTensor():
            return numbers.view(1, 1).clone()
        case PerChannel(axis):
            return numbers.view(*([-1, 1] if axis % 2 else [1, -1])).clone()
        case Blocks():
            return numbers.T.contiguous()


class _Rounding:
    """One pass over the columns in `order`; `upper` is U for that order.

    Args:
        scales_first: choose all scales before any column is rounded; otherwise those of a block
            when its first column is reached.
    """

    def __init__(
        self, weight: Tensor, upper: Tensor, order: Tensor, scheme: Scheme, scales_first: bool
    ):
        self.upper, self.order = upper, order
        self.weight = weight.T[order].contiguous()
        self.importance = upper.diagonal().square().reciprocal()
        self.chooses_late = isinstance(scheme.granularity, PerBlock) and not scales_first
        in_place = torch.empty_like(self.importance).index_copy_(0, order, self.importance)
        encoding = (
            measure(weight, scheme) if self.chooses_late else search_scale(weight, scheme, in_place)
        )
        self.grid = _Grid(encoding, weight.shape[1])
        self.row_of_place = self.grid.row_of_column[order].tolist()
        # neighbors in the order of activations are of different blocks
        self.run = 1 if scales_first and self.grid.run is not None else self.grid.run

    def run_columns(self) -> QuantizedTensor:
        columns = len(self.weight)
        steps = torch.empty_like(self.weight)
        for start in range(0, columns, _RUN):
            stop = min(start + _RUN, columns)
            errors = torch.empty_like(self.weight[start:stop])
            for first, last in self._spans(start, stop):
                if self.chooses_late and first % self.grid.size == 0:
                    self._choose(first, errors, start)
                span = errors[first - start : last - start]
                span.copy_(self._round(first, last, steps))
                self.weight[last:stop].addmm_(self.upper[first:last, last:stop].T, span, alpha=-1)
            self.weight[stop:].addmm_(self.upper[start:stop, stop:].T, errors, alpha=-1)
        return self.grid.quantized(steps)

    def _spans(self, start: int, stop: int) -> pairwise[tuple[int, int]]:
        """Columns that share their scales, so that all are rounded in units of one."""
        run = self.run or stop
        return pairwise([start, *range((start // run + 1) * run, stop, run), stop])

    def _round(self, first: int, last: int, steps: Tensor) -> Tensor:
        """Round columns `first` to `last`; returns e of each. Computes with `w / s` and `n`, which
        saves two passes per column.
        """
        row = self.row_of_place[first]
        s, low = self.grid.scale[row], self.grid.offset[row]
        high = low + self.grid.scheme.steps
        left = self.weight[first:last].div_(s)
        inside = self.upper[first:last, first:last]
        ratios = inside / inside.diagonal().unsqueeze(1)
        rounded = torch.empty_like(left)
        for i in range(last - first):
            torch.clamp(torch.round(left[i], out=rounded[i]), low, high, out=rounded[i])
            left[i].sub_(rounded[i])
            left[i + 1 :].addr_(ratios[i, i + 1 :], left[i], alpha=-1)
        steps[self.order[first:last]] = rounded
        return left.mul_(s).div_(inside.diagonal().unsqueeze(1))

    def _choose(self, first: int, errors: Tensor, start: int) -> None:
        """Choose the scales of the block that begins at column `first`, from the weights as they
        are now. Columns after the run are updated beforehand.
        """
        last = first + self.grid.size
        block = self.weight[first:last]
        not_updated = max(first, start + len(errors))
        if not_updated < last and first > start:
            block = block.clone()
            block[not_updated - first :] -= (
                self.upper[start:first, not_updated:last].T @ errors[: first - start]
            )
        chosen = search_scale(
            block.T.contiguous(), self.grid.scheme, self.importance[first:last], coarse=True
        )
        row = self.row_of_place[first]
        self.grid.scale[row], self.grid.offset[row] = chosen.scale.view(-1), chosen.offset.view(-1)


class _Refinement:
    """Coordinate descent on `tr((W - W_hat) H (W - W_hat)^T)`: no step makes it larger.

        code of column i     n_i <- clamp(round((w_hat_i + g_i / H_ii) / s)),      g = (W - W_hat) H
        scale of block b     s_b <- s_b + sum_b n g / sum_bb n H n  (per row; not LPBQ, tensor)

    The first is QuantEase (Behdin et al. 2023, https://arxiv.org/abs/2309.01885), the second the
    least squares scale for the codes as they are.
    """

    def __init__(self, weight: Tensor, hessian: Tensor, start: QuantizedTensor):
        self.hessian, self.grid = hessian, _Grid(start.encoding, weight.shape[1])
        rows = self.grid.row_of_column
        self.steps = start.codes.T.float() + self.grid.offset[rows]
        self.gradient = hessian @ (weight.T.contiguous() - self.steps * self.grid.scale[rows])

    def sweep(self) -> None:
        """Every scale once, then every code once."""
        grid, columns = self.grid, len(self.steps)
        match grid.scheme.granularity:
            case PerBlock():
                self._refit_scales(storable=True)
            case PerChannel(axis) if axis % 2 == 0:
                self._refit_scales(storable=False)
        width = _RUN if grid.run is None else math.gcd(grid.run, _RUN)
        for first in range(0, columns, width):
            self._round(first, min(first + width, columns))

    def result(self) -> QuantizedTensor:
        return self.grid.quantized(self.steps)

    def _refit_scales(self, storable: bool) -> None:
        for row in range(len(self.grid.scale)):
            block = slice(row * self.grid.size, (row + 1) * self.grid.size)
            steps = self.steps[block]
            curvature = ((self.hessian[block, block] @ steps) * steps).sum(0)
            old = self.grid.scale[row].clone()
            wanted = old + (steps * self.gradient[block]).sum(0) / curvature
            new = storable_scale(wanted) if storable else wanted
            is_better = (new - wanted).abs() < (old - wanted).abs()
            new = torch.where(torch.isfinite(wanted) & (wanted > 0) & is_better, new, old)
            self.grid.scale[row] = new
            self.gradient.addmm_(self.hessian[:, block], steps * (new - old), alpha=-1)

    def _round(self, first: int, last: int) -> None:
        """Columns that share their scales, in units of one; see `_Rounding._round`."""
        columns, row = slice(first, last), first // self.grid.size
        s, low = self.grid.scale[row], self.grid.offset[row]
        high = low + self.grid.scheme.steps
        inside, before = self.hessian[columns, columns], self.steps[columns]
        gradient, after = self.gradient[columns] / s, torch.empty_like(before)
        for i, factor in enumerate(inside.diagonal().reciprocal().tolist()):
            torch.add(before[i], gradient[i], alpha=factor, out=after[i]).round_()
            torch.clamp(after[i], low, high, out=after[i])
            gradient[i + 1 :].addr_(inside[i, i + 1 :], after[i] - before[i], alpha=-1)
        moved = (after - before).mul_(s)
        before.copy_(after)
        self.gradient.addmm_(self.hessian[:, columns], moved, alpha=-1)
