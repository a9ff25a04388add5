"""One tensor of a model: the float it is, what a solver makes of it, and how good that is. Called by whoever walks a model, in memory or in its files."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from qwlora.errors import CalibrationError
from qwlora.grid.observers import measure
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.second_moments import output_energy
from qwlora.nn import is_packable, parameter_out_in, weight_out_in
from qwlora.parameter_names import canonical_name
from qwlora.quantize.layer_rules import Assignment
from qwlora.quantize.solvers import solve


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Args:
        error: output error `tr(D R D^T) / tr(W R W^T)`, where the input's moment R is known.
        rtn_error: the same for rounding to nearest.
        damping: what made the moment positive definite (gptq).
    """

    scheme: str
    solver: str
    error: float | None = None
    rtn_error: float | None = None
    damping: float | None = None


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
    """Quantize one tensor, and say how well.

    Raises:
        CalibrationError: as `solve`, with the tensor's name.
    """
    weight = weight.detach().float()
    try:
        quantized, report = solve(weight, todo.scheme, todo.solver, moment, todo.gptq)
    except CalibrationError as error:
        raise CalibrationError(f"{canonical_name(name)}: {error}") from error
    if moment is None:
        return quantized, LayerReport(str(todo.scheme), todo.solver)
    whole = output_energy(weight, moment)
    own_error = (
        report.relative_error
        if report
        else output_energy(weight - quantized.dequantize(), moment) / whole
    )
    rtn_error = (
        output_energy(weight - measure(weight, todo.scheme).fake_quantize(weight), moment) / whole
    )
    return quantized, LayerReport(
        str(todo.scheme), todo.solver, own_error, rtn_error, report.damping if report else None
    )
