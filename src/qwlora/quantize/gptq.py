"""GPTQ: round a weight column by column, and let the columns that are still float compensate the
error (Frantar et al. 2022, https://arxiv.org/abs/2210.17323).

    minimize   tr((W - W_hat) H (W - W_hat)^T)
               H = R + damping * mean(diag R) * I,    R = E[w x x^T]  (grid/second_moments.py)
    column i   e = (w_i - w_hat_i) / U_ii;    w_j -= e U_ij for j > i
               H^-1 = U^T U,  U upper triangular

The updates of a run of columns reach later columns in one matrix product. Each scale is the one
with the least weighted error (`scale_search.py`)

    sum_i (w_i - w_hat_i)^2 / U_ii^2

that is, with the weights that column i's error has in the total once later columns compensate it.

    blocks                              when the first column of the block is reached, from the
                                        weights as they are then
    tensor, channel, LPBQ, and all      before any column is rounded
    granularities in activation order

With `activation_order` columns are visited in the order of falling diag R. A column that no input
reached (`R_ii = 0`) is rounded to nearest. If H is not positive definite in float32, the damping is
raised tenfold until it is; the report says which damping was used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from qwlora.errors import CalibrationError, GridError
from qwlora.grid.encoding import Encoding
from qwlora.grid.min_max import measure
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, PerTensor, Scheme
from qwlora.grid.second_moments import output_energy
from qwlora.quantize.scale_search import COARSE, search_scale, storable_scale

_RUN = 32  # columns between two updates of all that follow
_LEAST_DAMPING = 1e-6  # first damping if 0 was requested and H is not positive definite


@dataclass(frozen=True)
class GptqSettings:
    """Settings of GPTQ.

    Args:
        damping: added to the diagonal of R, as a share of its mean.
        activation_order: quantize the columns with the largest inputs first; scales are then chosen
            before any column is rounded.
        sweeps: passes of coordinate descent afterwards; each improves codes and scales one at a
            time (see `_Refinement`).

    Raises:
        GridError: damping or sweeps are negative, or damping is infinite.
    """

    damping: float = 0.01
    activation_order: bool = False
    sweeps: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.damping < math.inf:
            raise GridError(f"damping {self.damping} is not a finite number of at least 0")
        if self.sweeps < 0:
            raise GridError(f"sweeps is {self.sweeps}; it must be at least 0")


@dataclass(frozen=True)
class GptqReport:
    """The damping that made H positive definite, and the output error of the result,
    `tr(D R D^T) / tr(W R W^T)`.
    """

    damping: float
    relative_error: float


def solve_gptq(
    weight: Tensor, scheme: Scheme, moment: Tensor | None, settings: GptqSettings | None
) -> tuple[QuantizedTensor, dict[str, float]]:
    """`gptq` as a registered solver."""
    if moment is None:
        raise CalibrationError(
            "no calibration data reached this layer, or its output changes nothing. Add a rule for "
            "it: solver: search, or keep: float."
        )
    quantized, report = gptq(weight, moment, scheme, settings)
    return quantized, {"error": report.relative_error, "damping": report.damping}


def gptq(
    weight: Float[Tensor, "out in"],
    moment: Float[Tensor, "in in"],
    scheme: Scheme,
    settings: GptqSettings | None = None,
) -> tuple[QuantizedTensor, GptqReport]:
    """Codes and encoding of `weight` for inputs with the second moment `moment`.

    Raises:
        GridError: the scheme does not fit, has float offsets, or `moment` is not [in, in].
        CalibrationError: weight or moment hold nan or infinity.
    """
    settings = settings or GptqSettings()
    weight = weight.detach().float()
    columns = weight.shape[1]
    if moment.shape != (columns, columns):
        raise GridError(
            f"a weight with {columns} inputs needs a moment of shape {[columns, columns]}, not "
            f"{list(moment.shape)}"
        )
    if not bool(torch.isfinite(weight).all() and torch.isfinite(moment).all()):
        raise CalibrationError("the weight or the moment of its input holds nan or infinity")
    scheme.scale_shape(tuple(weight.shape))
    order = (
        torch.argsort(moment.diagonal(), descending=True)
        if settings.activation_order
        else torch.arange(columns, device=weight.device)
    )
    hessian, upper, damping = _factor(moment.float(), settings.damping, order)
    result = _Rounding(weight, upper, order, scheme, beforehand=settings.activation_order).run()
    if settings.sweeps:
        refined = _Refinement(weight, hessian, result)
        for _ in range(settings.sweeps):
            refined.sweep()
        result = refined.result()
    return result, GptqReport(
        damping, output_energy(weight - result.dequantize(), moment) / output_energy(weight, moment)
    )


def _factor(moment: Tensor, damping: float, order: Tensor) -> tuple[Tensor, Tensor, float]:
    """(H, U of its rows and columns in `order`, damping used)."""
    diagonal = moment.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal.mean()) or 1.0
    hessian = moment.clone()
    hessian.diagonal()[dead] += mean
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order])
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return damped, upper, damping
        damping = 10 * damping or _LEAST_DAMPING


class _Rounding:
    """One pass over the columns in `order`; `upper` is U for that order. Stored transposed, [in,
    out], so that a column is contiguous.
    """

    def __init__(
        self, weight: Tensor, upper: Tensor, order: Tensor, scheme: Scheme, beforehand: bool
    ):
        self.shape, self.upper, self.order, self.scheme = weight.shape, upper, order, scheme
        self.weight = weight.T[order].contiguous()
        self.importance = upper.diagonal().square().reciprocal()
        self.size = (
            scheme.granularity.size
            if isinstance(scheme.granularity, PerBlock | Lpbq)
            else weight.shape[1]
        )
        late = isinstance(scheme.granularity, PerBlock) and not beforehand
        self.block_scheme = (
            Scheme(scheme.bitwidth, scheme.symmetric, PerBlock(self.size)) if late else None
        )
        self.run_of_scale = _columns_of_a_scale(scheme)
        if beforehand and self.run_of_scale is not None:
            self.run_of_scale = 1  # neighbours in the order are of different blocks
        in_place = torch.empty_like(self.importance).index_copy_(0, order, self.importance)
        self.encoding = measure(weight, scheme) if late else search_scale(weight, scheme, in_place)

    def run(self) -> QuantizedTensor:
        columns = len(self.weight)
        scale, offset = (
            _per_column(t, self.scheme, self.shape).T.contiguous()
            for t in (self.encoding.scale, self.encoding.offset)
        )
        steps = torch.empty_like(self.weight)
        places = self.order
        for start in range(0, columns, _RUN):
            stop = min(start + _RUN, columns)
            errors = torch.empty_like(self.weight[start:stop])
            for first, last in self._spans(start, stop):
                if self.block_scheme is not None and first % self.size == 0:
                    self._choose(first, scale, offset, errors, start)
                errors[first - start : last - start] = self._round(
                    first, last, scale[places[first:last]], offset[places[first:last]], steps
                )
                self.weight[last:stop].addmm_(
                    self.upper[first:last, last:stop].T,
                    errors[first - start : last - start],
                    alpha=-1,
                )
            self.weight[stop:].addmm_(self.upper[start:stop, stop:].T, errors, alpha=-1)
        groups = self.scheme.scale_shape(tuple(self.shape))
        encoding = Encoding(
            self.scheme,
            *(
                _per_group(t.T, self.scheme).reshape(groups).contiguous()
                for t in (scale, offset.int())
            ),
        )
        return QuantizedTensor((steps - offset).to(torch.uint8).T.contiguous(), encoding)

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Columns that share their scales, so that all are rounded in units of one."""
        run = self.run_of_scale
        yield from pairwise(
            [start, stop]
            if run is None
            else [start, *range((start // run + 1) * run, stop, run), stop]
        )

    def _round(self, first: int, last: int, scale: Tensor, offset: Tensor, steps: Tensor) -> Tensor:
        """Round columns `first` to `last`; returns e of each. Computes with `w / s` and `n`, which
        saves two passes per column.
        """
        s, low = scale[0], offset[0]
        high = low + self.scheme.steps
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

    def _choose(self, i: int, scale: Tensor, offset: Tensor, errors: Tensor, start: int) -> None:
        """Choose the scales of the block that begins at column `i`, from the weights as they are
        now. Columns after the run are updated first.
        """
        last = i + self.size
        block = self.weight[i:last]
        behind = max(i, start + len(errors))
        if behind < last and i > start:
            block = block.clone()
            block[behind - i :] -= self.upper[start:i, behind:last].T @ errors[: i - start]
        importance, scheme = self.importance[i:last], self.block_scheme
        assert scheme is not None
        found = search_scale(block.T.contiguous(), scheme, importance, fractions=COARSE)
        scale[i:last] = found.scale.T
        offset[i:last] = found.offset.T


def _columns_of_a_scale(scheme: Scheme) -> int | None:
    """Number of consecutive columns that share their scales; None if all do."""
    match scheme.granularity:
        case PerBlock(size) | Lpbq(size):
            return size
        case PerChannel(axis) if axis % 2:
            return 1
        case _:
            return None


def _per_column(groups: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    """A scale or offset for each weight, float32 [out, in]."""
    match scheme.granularity:
        case PerTensor():
            return groups.float().expand(shape)
        case PerChannel(axis):
            return groups.float().view(*([-1, 1] if axis % 2 == 0 else [1, -1])).expand(shape)
        case PerBlock(size) | Lpbq(size):
            return groups.float().repeat_interleave(size, dim=-1)


def _per_group(columns: Tensor, scheme: Scheme) -> Tensor:
    """Undo `_per_column`."""
    match scheme.granularity:
        case PerTensor():
            return columns[0, 0]
        case PerChannel(axis):
            return columns[:, 0] if axis % 2 == 0 else columns[0]
        case PerBlock(size) | Lpbq(size):
            return columns[:, ::size]


class _Refinement:
    """Coordinate descent on `tr((W - W_hat) H (W - W_hat)^T)`: no step makes it larger.

        code of column i     n_i <- clamp(round((w_hat_i + g_i / H_ii) / s)),      g = (W - W_hat) H
        scale of block b     s_b <- s_b + sum_b n g / sum_bb n H n  (per row; not LPBQ, tensor)

    The first is QuantEase (Behdin et al. 2023, https://arxiv.org/abs/2309.01885), the second the
    least squares scale for the codes as they are. Held transposed, [in, out].
    """

    def __init__(self, weight: Tensor, hessian: Tensor, start: QuantizedTensor):
        encoding = start.encoding
        self.shape, self.hessian, self.scheme, self.encoding = (
            weight.shape,
            hessian,
            encoding.scheme,
            encoding,
        )
        self.weight = weight.T.contiguous()
        self.scale = _per_column(encoding.scale, self.scheme, weight.shape).T.contiguous()
        self.offset = _per_column(encoding.offset, self.scheme, weight.shape).T.contiguous()
        self.steps = start.codes.T.float() + self.offset
        self._gradient = self.hessian @ (self.weight - self.steps * self.scale)

    def sweep(self) -> None:
        """Every scale once, then every code once."""
        match self.scheme.granularity:
            case Lpbq() | PerTensor():
                pass
            case PerBlock(size):
                self._scales(size, storable=True)
            case PerChannel(axis) if axis % 2 == 0:
                self._scales(len(self.weight), storable=False)
        run = _columns_of_a_scale(self.scheme)
        width = _RUN if run is None else math.gcd(run, _RUN)
        for first in range(0, len(self.weight), width):
            self._codes(first, min(first + width, len(self.weight)))

    def result(self) -> QuantizedTensor:
        scale = (
            _per_group(self.scale.T, self.scheme).reshape(self.encoding.scale.shape).contiguous()
        )
        return QuantizedTensor(
            (self.steps - self.offset).to(torch.uint8).T.contiguous(),
            Encoding(self.scheme, scale, self.encoding.offset),
        )

    def _scales(self, size: int, storable: bool) -> None:
        for first in range(0, len(self.weight), size):
            block = slice(first, first + size)
            steps = self.steps[block]
            curvature = ((self.hessian[block, block] @ steps) * steps).sum(0)
            old = self.scale[first].clone()
            wanted = old + (steps * self._gradient[block]).sum(0) / curvature
            new = storable_scale(wanted) if storable else wanted
            usable = (
                torch.isfinite(wanted)
                & (wanted > 0)
                & ((new - wanted).abs() < (old - wanted).abs())
            )
            new = torch.where(usable, new, old)
            self.scale[block] = new
            self._gradient.addmm_(self.hessian[:, block], steps * (new - old), alpha=-1)

    def _codes(self, first: int, last: int) -> None:
        """Columns that share their scales, in units of one; see `_Rounding._round`."""
        columns = slice(first, last)
        s, low = self.scale[first], self.offset[first]
        high = low + self.scheme.steps
        inside, before = self.hessian[columns, columns], self.steps[columns]
        gradient, after = self._gradient[columns] / s, torch.empty_like(before)
        inverse = inside.diagonal().reciprocal().tolist()
        for i, factor in enumerate(inverse):
            torch.clamp(
                torch.add(before[i], gradient[i], alpha=factor, out=after[i]).round_(),
                low,
                high,
                out=after[i],
            )
            change = torch.sub(after[i], before[i])
            gradient[i + 1 :].addr_(inside[i, i + 1 :], change, alpha=-1)
        moved = (after - before).mul_(s)
        before.copy_(after)
        self._gradient.addmm_(self.hessian[:, columns], moved, alpha=-1)
