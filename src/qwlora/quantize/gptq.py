"""Round a weight column by column; the columns that are still float compensate the error
(https://arxiv.org/abs/2210.17323).

    minimize   tr((W - W_hat) H (W - W_hat)^T)
               H = R + damping * mean(diag R) * I,    R = E[w x x^T]  (grid/second_moments.py)
    column i   e = (w_i - w_hat_i) / U_ii;    w_j -= e U_ij for j > i
               H^-1 = U^T U,  U upper triangular

Each scale has the least `sum_i (w_i - w_hat_i)^2 / U_ii^2` (`scale_search.py`). Scales of blocks
are chosen when their first column is reached, all others before any column is rounded.

With `activation_order` columns are visited in the order of falling diag R, and all scales are
chosen before any column is rounded. If H is not positive definite in float32, the damping is raised
tenfold until it is; the report says which damping was used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qwlora.errors import CalibrationError, GridError
from qwlora.grid.encoding import Encoding, QuantizedTensor, measure
from qwlora.grid.scheme import Blocks, PerChannel, Scheme
from qwlora.grid.second_moments import factor_damped
from qwlora.quantize.scale_search import search_scale, storable_scale

# Matrices are transposed here, [in, out], so that a column of the weight is contiguous, which
# halves the time (docs/log/solvers.md). Scales and offsets have one row per run of columns that
# share them: [1, out] per channel, [in / size, out] in blocks.
_RUN = 32  # columns between two updates of the remaining columns


@dataclass(frozen=True)
class GptqSettings:
    """Settings of GPTQ."""

    damping: float = 0.01  # added to the diagonal of R, as a share of its mean
    activation_order: bool = False  # quantize the columns with the largest inputs first
    # Blocks of 32: 0.57 times gptqmodel's error in 1.9 times its time; 0.67 and 0.86 times without
    # sweeps. Four sweeps gain 2 % more and take 1.5 times as long as two (docs/log/solvers.md).
    sweeps: int = 2  # passes of coordinate descent afterwards, see `_refine`

    def __post_init__(self) -> None:
        if not 0 <= self.damping < math.inf:
            raise GridError(f"damping {self.damping} is not a finite number of at least 0")
        if self.sweeps < 0:
            raise GridError(f"sweeps is {self.sweeps}; it must be at least 0")


def solve_gptq(
    weight: Tensor, scheme: Scheme, moment: Tensor | None, settings: GptqSettings | None = None
) -> tuple[QuantizedTensor, dict[str, float]]:
    """`gptq` as a registered solver; reports its `damping`."""
    if moment is None:
        raise CalibrationError(
            "no calibration data reached this layer, or its output has no effect. Add a rule: "
            "solver: search, or keep: float"
        )
    settings = settings or GptqSettings()
    weight, moment = weight.detach().float(), moment.float()
    if not bool(torch.isfinite(weight).all() and torch.isfinite(moment).all()):
        raise CalibrationError("the weight or the moment of its input holds nan or infinity")
    if isinstance(scheme.granularity, PerChannel) and scheme.granularity.axis % 2:
        raise GridError("gptq needs scales per output: use PerChannel(0), PerBlock or PerTensor")
    scheme.scale_shape(tuple(weight.shape))
    order = torch.arange(weight.shape[1], device=weight.device)
    if settings.activation_order:
        order = torch.argsort(moment.diagonal(), descending=True)
    hessian, upper, damping = _factored(moment, order, settings.damping)
    result = _round_columns(weight, upper, scheme, order, settings.activation_order)
    if settings.sweeps:
        result = _refine(weight, hessian, result, settings.sweeps)
    return result, {"damping": damping}


def input_importance(moment: Tensor, settings: GptqSettings | None = None) -> Tensor:
    """1 / U_ii^2 of each input: the cost of a column's squared error after compensation."""
    order = torch.arange(len(moment), device=moment.device)
    _, upper, _ = _factored(moment.float(), order, (settings or GptqSettings()).damping)
    return upper.diagonal().square().reciprocal()


def _factored(moment: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """H, U for columns in `order`, and the damping that was used."""

    def factor(damped: Tensor) -> Tensor | None:
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order])
        if int(failed):
            return None
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        return None if int(failed) else upper

    mean = float(moment.diagonal().mean()) or 1.0
    hessian = moment.clone()
    # A column that no input reached has no errors to compensate. Any positive diagonal makes GPTQ
    # round it to nearest.
    hessian.diagonal()[moment.diagonal() <= 0] += mean
    return factor_damped(hessian, mean, damping, factor)


class _Grid:
    """The scales and offsets of a weight [out, in], one row for each run of `size` columns."""

    def __init__(self, encoding: Encoding, columns: int):
        self.encoding, granularity = encoding, encoding.scheme.granularity
        self.size = granularity.size if isinstance(granularity, Blocks) else columns
        self.scale, self.offset = (
            (numbers.T if numbers.ndim == 2 else numbers.view(1, -1)).clone(
                memory_format=torch.contiguous_format
            )
            for numbers in (encoding.scale, encoding.offset.float())
        )

    def by_column(self, rows: Tensor) -> Tensor:
        return rows.repeat_interleave(self.size, 0)

    def quantized(self, steps: Tensor) -> QuantizedTensor:
        """The tensor with codes plus offset `steps` [in, out]."""
        scale, offset = (
            rows.T.reshape(self.encoding.scale.shape).contiguous()
            for rows in (self.scale, self.offset.int())
        )
        codes = (steps - self.by_column(self.offset)).to(torch.uint8).T.contiguous()
        return QuantizedTensor(codes, Encoding(self.encoding.scheme, scale, offset))


def _round_columns(
    weight: Tensor, upper: Tensor, scheme: Scheme, order: Tensor, scales_first: bool
) -> QuantizedTensor:
    """One pass over the columns in `order`; `upper` is U for that order."""
    columns = weight.shape[1]
    importance = upper.diagonal().square().reciprocal()
    # Scales of blocks wait until their first column is reached: by then, the errors of the columns
    # before have moved the weights of the block.
    chooses_late = scheme.granularity.is_free and not scales_first
    if chooses_late:
        encoding = measure(weight, scheme)
    else:
        in_place = torch.empty_like(importance).index_copy_(0, order, importance)
        encoding = search_scale(weight, scheme, in_place)
    grid = _Grid(encoding, columns)
    rows = (order // grid.size).tolist()
    weight = weight.T[order].contiguous()
    # Neighbors in activation order belong to different blocks.
    size = 1 if scales_first and isinstance(scheme.granularity, Blocks) else grid.size
    steps = torch.empty_like(weight)
    for start in range(0, columns, _RUN):
        stop = min(start + _RUN, columns)
        errors = torch.empty_like(weight[start:stop])
        ends_of_blocks = range((start // size + 1) * size, stop, size)
        for first, last in pairwise([start, *ends_of_blocks, stop]):
            row = rows[first]
            if chooses_late and first % size == 0:
                end = first + size
                block, not_updated = weight[first:end], max(first, stop)
                # Columns after this run have not received the errors of the run yet.
                if not_updated < end and first > start:
                    block = block.clone()
                    block[not_updated - first :] -= (
                        upper[start:first, not_updated:end].T @ errors[: first - start]
                    )
                chosen = search_scale(
                    block.T.contiguous(), scheme, importance[first:end], coarse=True
                )
                grid.scale[row], grid.offset[row] = chosen.scale.view(-1), chosen.offset.view(-1)
            # In units of the scale, a column takes four small operations instead of nine, which
            # halves the time (docs/log/solvers.md).
            s, low = grid.scale[row], grid.offset[row]
            high = low + scheme.steps
            left = weight[first:last].div_(s)
            inside = upper[first:last, first:last]
            ratios = inside / inside.diagonal().unsqueeze(1)
            rounded = torch.empty_like(left)
            for i in range(last - first):
                torch.clamp(torch.round(left[i], out=rounded[i]), low, high, out=rounded[i])
                left[i].sub_(rounded[i])
                left[i + 1 :].addr_(ratios[i, i + 1 :], left[i], alpha=-1)
            steps[order[first:last]] = rounded
            span = errors[first - start : last - start]
            span.copy_(left.mul_(s).div_(inside.diagonal().unsqueeze(1)))
            weight[last:stop].addmm_(upper[first:last, last:stop].T, span, alpha=-1)
        weight[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return grid.quantized(steps)


def _refine(
    weight: Tensor, hessian: Tensor, start: QuantizedTensor, sweeps: int
) -> QuantizedTensor:
    """Coordinate descent on `tr((W - W_hat) H (W - W_hat)^T)`: no step makes it larger. Each sweep
    improves every scale once, then every code once.

        scale of block b     s_b <- s_b + sum_b n g / sum_bb n H n  (per row; not LPBQ, tensor)
        code of column i     n_i <- clamp(round((w_hat_i + g_i / H_ii) / s)),      g = (W - W_hat) H

    The first is the least-squares scale for the current codes, the second is QuantEase (Behdin et
    al. 2023, https://arxiv.org/abs/2309.01885).
    """
    columns, scheme = weight.shape[1], start.encoding.scheme
    granularity = scheme.granularity
    grid = _Grid(start.encoding, columns)
    steps = start.codes.T.float() + grid.by_column(grid.offset)
    gradient = hessian @ (weight.T.contiguous() - steps * grid.by_column(grid.scale))
    is_free = scheme.granularity.is_free
    rows = range(len(grid.scale)) if is_free or isinstance(granularity, PerChannel) else ()
    width = math.gcd(grid.size, _RUN) if isinstance(granularity, Blocks) else _RUN
    for sweep in range(sweeps):
        # No row of the gradient is read after its own run of the last sweep.
        is_last = sweep == sweeps - 1
        for row in rows:
            block = slice(row * grid.size, (row + 1) * grid.size)
            n, old = steps[block], grid.scale[row].clone()
            curvature = ((hessian[block, block] @ n) * n).sum(0)
            wanted = old + (n * gradient[block]).sum(0) / curvature
            new = scheme.granularity.nearest(storable_scale(wanted)) if is_free else wanted
            # After rounding to float16, the new scale may be worse than the old one.
            is_better = (new - wanted).abs() < (old - wanted).abs()
            new = torch.where(torch.isfinite(wanted) & (wanted * old > 0) & is_better, new, old)
            grid.scale[row] = new
            gradient.addmm_(hessian[:, block], n * (new - old), alpha=-1)
        for first in range(0, columns, width):
            run, row = slice(first, min(first + width, columns)), first // grid.size
            s, low = grid.scale[row], grid.offset[row]
            inside, before = hessian[run, run], steps[run]
            g, after = gradient[run] / s, torch.empty_like(before)
            for i, factor in enumerate(inside.diagonal().reciprocal().tolist()):
                torch.add(before[i], g[i], alpha=factor, out=after[i]).round_()
                torch.clamp(after[i], low, low + scheme.steps, out=after[i])
                g[i + 1 :].addr_(inside[i, i + 1 :], after[i] - before[i], alpha=-1)
            moved = (after - before).mul_(s)
            before.copy_(after)
            later = slice(run.stop if is_last else 0, columns)
            gradient[later].addmm_(hessian[later, run], moved, alpha=-1)
    return grid.quantized(steps)
