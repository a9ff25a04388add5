"""The registry of solvers, which find the codes and encoding of a float weight, and of revisions.

    solve(weight, scheme, moment, settings) -> (QuantizedTensor, report)

    weight      float32 [out, in], or [experts, out, in]
    moment      second moment of the layer's input [in, in], if calibration data reached it
    settings    an object of the solver's settings class; None for the defaults
    report      the fields of the `LayerReport` that only the solver knows

It raises GridError if the scheme does not fit the weight, and CalibrationError if weight or moment
hold nan or infinity, or the moment is missing.

A new solver needs a module with such a function and a class for its settings, if any, and an entry
and a revision in this file. Recipes and rules take the names from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, cast

from qwlora.errors import GridError

if TYPE_CHECKING:
    from torch import Tensor

    from qwlora.grid.encoding import QuantizedTensor
    from qwlora.grid.scheme import Scheme

    Solve = Callable[[Tensor, Scheme, Tensor | None, Any], tuple[QuantizedTensor, dict[str, float]]]


@dataclass(frozen=True)
class Solver:
    """A solver. A recipe sets its settings in `base`, under the solver's name."""

    name: str
    # As "module:function": a solver's module, and torch, are imported when it first solves.
    function: str
    needs_calibration: bool = False  # whether it needs the second moment of the layer's input
    settings: str | None = None  # their class, as "module:class"; None without any

    @property
    def solve(self) -> Solve:
        return cast("Solve", resolve_name(f"qwlora.{self.function}"))

    def settings_of(self, values: Mapping[str, Any]) -> Any:
        return resolve_name(f"qwlora.{self.settings}")(**values)


_SOLVERS = (
    Solver("rtn", "quantize.scale_search:solve_rtn"),
    Solver("search", "quantize.scale_search:solve_search"),
    Solver("sqnr", "quantize.scale_search:solve_sqnr"),
    Solver("gptq", "quantize.gptq:solve_gptq", True, settings="quantize.gptq:GptqSettings"),
)
SOLVERS = {solver.name: solver for solver in _SOLVERS}
ROUNDING_SOLVERS = ("search", "sqnr", "gptq")  # they round scales of blocks to float16

if TYPE_CHECKING:
    SolverName = str
else:  # for the recipe, which validates it
    SolverName = Literal[tuple(SOLVERS)]


def solver_named(name: str) -> Solver:
    """The registered solver of this name."""
    if name not in SOLVERS:
        raise GridError(f"solver {name!r} is not one of {', '.join(SOLVERS)}")
    return SOLVERS[name]


# Revisions of the algorithms whose results are stored. Stage keys and caches contain the revisions
# of their algorithms, so results of older revisions are computed again. Raise a number when the
# same inputs give different results: tests/quantize/test_revisions.py fails if a result changes and
# its number does not.
REVISIONS = {
    # solvers, by their names in a recipe
    "rtn": 1,
    "search": 2,  # 2: ranges below 0.3 of the min-max range
    "sqnr": 2,
    "gptq": 2,
    # of the base
    "layer_statistics": 2,  # 2: tokens are weighted
    "bit_budget": 1,
    "sampled_text": 1,
    # 2: norms are tuned as well; 3: the solver's scales are kept; 4: sequences are shuffled
    "tune_scales": 4,
    # 2: qera weighs outputs; 3: corrects the solver's error; 4: shorter B where inputs are large;
    # 5: moments of the adapter's own text
    "initialize_adapter": 5,
    "activation_ranges": 3,  # 3: histogram of all values
    "canary": 1,
    "token_scores": 2,  # 2: KL divergence, same likeliest token and standard errors
}
