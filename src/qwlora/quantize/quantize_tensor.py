"""Quantize one tensor of a model and report how well. Shared by quantization in memory and from
files.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from qwlora.errors import CalibrationError, QwloraWarning
from qwlora.grid.min_max import measure
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.second_moments import output_energy
from qwlora.messages import listed
from qwlora.nn import is_packable, parameter_out_in, weight_out_in
from qwlora.parameter_names import canonical_name
from qwlora.quantize.layer_rules import Assignment
from qwlora.quantize.requantization_check import is_on_grid
from qwlora.quantize.solvers import SOLVERS

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


def tensor_out_in(model: nn.Module, name: str) -> Tensor:
    """The float tensor `name` as [out, in], or [experts, out, in]."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return (
        weight_out_in(module)
        if key == "weight" and is_packable(module)
        else parameter_out_in(module, key)
    )


def solve_tensor(
    name: str, weight: Tensor, todo: Assignment, moment: Tensor | None = None
) -> tuple[QuantizedTensor, LayerReport]:
    """Quantize one tensor and measure the error.

    Raises:
        GridError, CalibrationError: as the solver; the latter with the tensor's name.
    """
    was_on_grid = is_on_grid(weight, todo.scheme.bitwidth)
    weight = weight.detach().float()
    try:
        solver = SOLVERS[todo.solver]
        quantized, known = solver.solve(weight, todo.scheme, moment, todo.settings)
    except CalibrationError as error:
        raise CalibrationError(f"{canonical_name(name)}: {error}") from error
    difference, energy = weight - quantized.dequantize(), float(weight.square().sum())
    weight_error = float(difference.square().sum()) / energy if energy else None
    second = _second_rounding(weight_error) if was_on_grid else None
    if moment is None:
        return quantized, LayerReport(
            str(todo.scheme), todo.solver, second_rounding=second, weight_error=weight_error
        )
    whole = output_energy(weight, moment)
    if "error" not in known:
        known["error"] = output_energy(difference, moment) / whole
    rtn_error = (
        output_energy(weight - measure(weight, todo.scheme).fake_quantize(weight), moment) / whole
    )
    return quantized, LayerReport(
        str(todo.scheme),
        todo.solver,
        rtn_error=rtn_error,
        second_rounding=second,
        weight_error=weight_error,
        **known,
    )


def _second_rounding(weight_error: float | None) -> float | None:
    error = math.sqrt(weight_error or 0.0)
    return error if error > _SAME_GRID else None


def warn_of_second_rounding(reports: Mapping[str, LayerReport]) -> None:
    """Warn about layers whose weights were already on a grid and were moved to another one."""
    found = {name: r.second_rounding for name, r in reports.items() if r.second_rounding}
    if not found:
        return
    worst = sorted(found.items(), key=lambda item: -item[1])
    shown = listed(f"{name} by {error:.1%}" for name, error in worst)
    warnings.warn(
        f"the weights of {len(found)} layers already were on a grid with as few levels, and were "
        f"rounded a second time, to another grid: {shown}. To keep the grid they had, set "
        "base.solver: keep in a recipe (and model.encodings, unless the model is a GGUF file), or "
        "give its encodings to qwlora.freeze_",
        QwloraWarning,
        stacklevel=3,
    )
