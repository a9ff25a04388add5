"""Which layers are quantized, and how: rules on module paths.

A rule has a glob over canonical module paths (`*.down_proj`, `model.layers.0.*`, `lm_head`). The
first rule that matches a layer decides its scheme and solver, or that it stays float. A layer
without a rule gets the scheme and solver of the base if it is quantized by default.

By default: every Linear, Conv1D and bank of fused experts, but not the heads. An output head shares
its weight with the embedding in tied models and costs most at few bits; a classifier is trained as
a whole (PEFT's `modules_to_save`). A rule can name any layer that can be packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from qwlora.errors import GridError
from qwlora.grid.scheme import Scheme
from qwlora.messages import suggestion
from qwlora.quantize.solvers import SOLVERS


@dataclass(frozen=True)
class Rule:
    """What happens to the layers whose path matches.

    Args:
        match: a glob (`*`, `?`, `[...]`) over the whole canonical module path.
        scheme: their scheme; None keeps them float.
        solver: their solver. Default: that of the base.
    """

    match: str
    scheme: Scheme | None
    solver: str | None = None


@dataclass(frozen=True)
class Assignment:
    """Scheme and solver of one tensor, and the solver's settings; None for the defaults."""

    scheme: Scheme
    solver: str
    settings: Any = None


@dataclass(frozen=True)
class Candidate:
    """A tensor that can be packed.

    Args:
        paths: canonical paths of the layers that read it (two if they are tied); for a parameter
            that is not the weight of a layer, its own path.
        by_default: whether it is quantized without a rule.
        calibrated: whether a solver that needs calibration can solve it (matrices of Linear and
            Conv1D).
    """

    paths: tuple[str, ...]
    by_default: bool
    calibrated: bool


def assign(
    candidates: Mapping[str, Candidate], scheme: Scheme, solver: str, rules: Sequence[Rule]
) -> dict[str, Assignment]:
    """Scheme and solver of each tensor that is quantized, in the order of the candidates.

    If the solver of the base needs calibration and a tensor has no matrix input to calibrate on
    (embeddings, kernels, fused experts), `search` replaces it.

    Raises:
        GridError: rules match nothing (all are named, with near names), or a rule gives a tensor a
            solver that cannot solve it.
    """
    names = [path for candidate in candidates.values() for path in candidate.paths]
    problems = [
        f"{rule.match!r} matches no layer{suggestion(rule.match, names, 3)}"
        for rule in rules
        if not any(fnmatchcase(name, rule.match) for name in names)
    ]
    found = {}
    for tensor, candidate in candidates.items():
        rule = next(
            (
                rule
                for rule in rules
                if any(fnmatchcase(path, rule.match) for path in candidate.paths)
            ),
            None,
        )
        if (rule is None and not candidate.by_default) or (
            rule is not None and rule.scheme is None
        ):
            continue
        chosen = rule.solver if rule is not None else None
        if chosen and SOLVERS[chosen].needs_calibration and not candidate.calibrated:
            problems.append(
                f"{candidate.paths[0]}: solver {chosen} follows the inputs of a matrix product and "
                "cannot solve this tensor; choose search, sqnr or rtn"
            )
        own = solver
        if SOLVERS[solver].needs_calibration and not candidate.calibrated:
            own = "search"
        found[tensor] = Assignment(
            scheme if rule is None or rule.scheme is None else rule.scheme, chosen or own
        )
    if problems:
        raise GridError(
            "\n  ".join([f"{len(problems)} of the base's rules cannot be followed:", *problems])
        )
    return found
