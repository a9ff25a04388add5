"""Quantize one tensor of a model and report how well."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from qwlora.errors import CalibrationError
from qwlora.grid.min_max import measure
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.second_moments import output_energy
from qwlora.quantize.layer_rules import Assignment
from qwlora.quantize.requantization_check import is_on_grid
from qwlora.quantize.solvers import SOLVERS
from qwlora.system.parameter_names import canonical_name

_SAME_GRID = 5e-3  # relative error up to which a second grid counts as the first; bfloat16 has 2e-3


@dataclass(frozen=True)
class LayerReport:
    """How one layer was quantized.

    Args:
        error: output error `tr(D R D^T) / tr(W R W^T)`, if the second moment R of the input is
            known.
        rtn_error: the same for rounding to nearest.
        damping: the damping that made the second moment positive definite (gptq).
        weight_error: share of the weights' energy lost, `|W - W_hat|^2 / |W|^2`; None for zeros.
        second_rounding: relative error `|W - W_hat| / |W|` of weights that were already on a grid
            with as few levels and were moved to another one.
    """

    scheme: str
    solver: str
    error: float | None = None
    rtn_error: float | None = None
    damping: float | None = None
    second_rounding: float | None = None
    weight_error: float | None = None


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
        relative = math.sqrt(report["weight_error"])
        if was_on_grid and relative > _SAME_GRID:
            report["second_rounding"] = relative
    if moment is not None:
        whole = output_energy(weight, moment)
        if "error" not in report:
            report["error"] = output_energy(difference, moment) / whole
        rounded = measure(weight, todo.scheme).fake_quantize(weight)
        report["rtn_error"] = output_energy(weight - rounded, moment) / whole
    return quantized, LayerReport(str(todo.scheme), todo.solver, **report)
