"""Solvers: from a float weight to codes and their encoding.

rtn      min-max range, round to nearest; AIMET's numbers
search   the grid with the least squared error in each group, then round to nearest (`fit.py`)
sqnr     the same, an error from clipping counting threefold (AIMET's enhanced rule)
gptq     each column makes good the errors of those before it, for the inputs that the layer really gets (`gptq.py`)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from qwlora.errors import CalibrationError, GridError
from qwlora.grid.encoding import Encoding
from qwlora.grid.observers import measure
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.quantize.gptq import GptqReport, GptqSettings, gptq
from qwlora.quantize.scale_search import fit

_DATA_FREE: dict[str, Callable[[Tensor, Scheme], Encoding]] = {
    "rtn": measure,
    "search": fit,
    "sqnr": partial(fit, clipping_penalty=3.0),
}
CALIBRATED = ("gptq",)
SOLVERS = (*_DATA_FREE, *CALIBRATED)


def check_solver(solver: str) -> None:
    """Refuse a solver that does not exist.

    Raises:
        GridError: with the ones that do.
    """
    if solver not in SOLVERS:
        raise GridError(f"solver {solver!r} is not one of {', '.join(SOLVERS)}")


def solve(
    weight: Tensor,
    scheme: Scheme,
    solver: str,
    moment: Tensor | None = None,
    settings: GptqSettings | None = None,
) -> tuple[QuantizedTensor, GptqReport | None]:
    """Quantize `weight` [out, in], or `[experts, out, in]` by a solver that looks at weights alone; what gptq says of itself.

    Args:
        moment: R of the layer's input, [in, in]; needed by gptq.
        settings: of gptq.

    Raises:
        GridError: the solver is unknown, or the scheme does not fit the weight.
        CalibrationError: gptq lacks the moment; weight or moment hold nan or infinity.
    """
    check_solver(solver)
    if solver in _DATA_FREE:
        encoding = _DATA_FREE[solver](weight, scheme)
        return QuantizedTensor(encoding.quantize(weight), encoding), None
    if moment is None:
        raise CalibrationError(
            "no calibration batch reaches this layer, or its output moves nothing there; give it solver search, or keep it float, by a rule"
        )
    return gptq(weight, moment, scheme, settings)
