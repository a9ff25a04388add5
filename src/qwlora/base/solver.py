"""Solvers: from a float weight to an encoding and codes.

rtn      min-max range, round to nearest
search   the range with the least squared error in each group, then round to nearest
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qwlora.errors import GridError
from qwlora.grid.encoding import Encoding
from qwlora.grid.observer import measure, search
from qwlora.grid.scheme import Scheme

SOLVERS: dict[str, Callable[[Tensor, Scheme], Encoding]] = {"rtn": measure, "search": search}


def solve(weight: Tensor, scheme: Scheme, solver: str) -> tuple[Tensor, Encoding]:
    """Codes and encoding of `weight` [out, in].

    Raises:
        GridError: the solver is unknown, or the scheme does not fit the weight.
    """
    if solver not in SOLVERS:
        raise GridError(f"solver {solver!r} is not one of {', '.join(SOLVERS)}")
    weight = weight.detach().float()
    encoding = SOLVERS[solver](weight, scheme)
    return encoding.quantize(weight), encoding
