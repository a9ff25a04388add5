"""Quantize one tensor of a model and report the error.

A float tensor may already lie on a uniform grid with few levels. Quantizing then rounds it a second
time, and keeping its own grid would be better. A run of weights w lies on a grid with at most 2^b
levels if, for some whole number K < 2^b,

    (w - min w) * K / (max w - min w)    are whole numbers

K is the number of steps that the run spans. Grids whose scale changes from one input to the next
are not recognized, nor grids in a type whose rounding is as large as a step (8 bits in bfloat16).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwlora.errors import CalibrationError, QwloraWarning, listed
from qwlora.grid.encoding import QuantizedTensor, measure
from qwlora.grid.second_moments import output_energy
from qwlora.quantize.layer_rules import Assignment
from qwlora.quantize.solvers import SOLVERS
from qwlora.system.parameter_names import canonical_name

_RUN = 32  # consecutive weights: within one block, whatever the granularity
_RUNS = 64
_CHANCE = 0.01
_SAME_GRID = 5e-3  # relative error up to which a second grid counts as the first; bfloat16 has 2e-3


@dataclass(frozen=True)
class LayerReport:
    """Scheme, solver and error of one quantized layer."""

    scheme: str
    solver: str
    error: float | None = None  # output error `tr(D R D^T) / tr(W R W^T)`, if R is known
    rtn_error: float | None = None  # the same for rounding to nearest
    damping: float | None = None  # that made the second moment positive definite (gptq)
    # `|W - W_hat| / |W|` of weights that were on another grid with as few levels before
    second_rounding: float | None = None
    weight_error: float | None = None  # `|W - W_hat|^2 / |W|^2`; None for zeros


def solve_tensor(
    name: str, weight: Tensor, todo: Assignment, moment: Tensor | None = None
) -> tuple[QuantizedTensor, LayerReport]:
    """Quantize one tensor and measure the error."""
    was_on_grid = is_on_grid(weight, todo.scheme.bitwidth)
    weight = weight.detach().float()
    try:
        quantized, report = SOLVERS[todo.solver].solve(weight, todo.scheme, moment, todo.settings)
    except CalibrationError as error:
        raise CalibrationError(f"{canonical_name(name)}: {error}") from error
    difference, energy = weight - quantized.dequantize(), float(weight.square().sum())
    if energy:
        report["weight_error"] = float(difference.square().sum()) / energy
    if moment is not None:
        whole = output_energy(weight, moment)
        report["error"] = output_energy(difference, moment) / whole
        rounded = measure(weight, todo.scheme).fake_quantize(weight)
        report["rtn_error"] = output_energy(weight - rounded, moment) / whole
    if was_on_grid and (relative := math.sqrt(report.get("weight_error", 0))) > _SAME_GRID:
        report["second_rounding"] = relative
    return quantized, LayerReport(str(todo.scheme), todo.solver, **report)


def is_on_grid(weight: Tensor, bitwidth: int) -> bool:
    """Whether `weight` [..., in] lies on a uniform grid of at most 2^bitwidth levels, as far as its
    runs can tell: most of them must."""
    if weight.is_meta or bitwidth > 8 or not weight.numel():
        return False
    rows = weight.detach().reshape(-1, weight.shape[-1])
    length = min(_RUN, rows.shape[1])
    per_row = rows.shape[1] // length
    count = min(_RUNS, len(rows) * per_row)
    which = torch.linspace(0, len(rows) * per_row - 1, count, device=weight.device).long()
    columns = (which % per_row * length).unsqueeze(1) + torch.arange(length, device=weight.device)
    runs = rows[(which // per_row).unsqueeze(1), columns]
    w = runs.double().sort(1).values
    different = 1 + (w.diff(dim=1) > 0).sum(1)
    w, different = w[different > 2], different[different > 2]
    low, high = w[:, :1], w[:, -1:]
    # All K are tried. With d different values and a tolerance t for the float type's rounding,
    # random weights pass with probability 2^b (2 t)^(d - 2). Only runs where it is low count.
    steps = torch.arange(1, 2**bitwidth, device=w.device, dtype=w.dtype).view(-1, 1, 1)
    position = steps * ((w - low) / (high - low))
    off = (position - position.round()).abs().amax(2)
    largest = torch.maximum(low.abs(), high.abs()) / (high - low)
    tolerance = 2 * torch.finfo(runs.dtype).eps * (steps * largest).squeeze(2)
    chance = 2**bitwidth * (2 * tolerance) ** (different - 2)
    fits = ((off <= tolerance) & (chance < _CHANCE)).any(0)
    return bool(fits.float().mean() > 0.5)


def warn_of_second_rounding(reports: Mapping[str, LayerReport]) -> None:
    """Warn about layers that were rounded a second time."""
    rounded = {name: error for name, r in reports.items() if (error := r.second_rounding)}
    if not rounded:
        return
    worst = sorted(rounded.items(), key=lambda item: -item[1])
    shown = listed(f"{name} by {error:.1%}" for name, error in worst)
    warnings.warn(
        "some weights had been quantized before and are now rounded again, to another grid, which "
        f"changes them: {shown}. If you have the quantized file, keep its integers: "
        "base.solver: keep in a recipe, qwlora.load_precomputed in Python",
        QwloraWarning,
        stacklevel=3,
    )
