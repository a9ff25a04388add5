"""Which layers are quantized, and how: rules on module paths.

A rule has a glob over canonical module paths (`*.down_proj`, `model.layers.0.*`, `lm_head`). The
first rule that matches a layer decides: its scheme and solver, or that the layer stays float. A
layer that no rule matches gets the base's own scheme and solver if it is one that is quantized by
default.

By default: every Linear and Conv1D and every bank of fused experts, but not the heads: an output
head is shared with the embedding in tied models and costs most at few bits; a classifier is trained
whole (PEFT's `modules_to_save`). A rule reaches whatever can be packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qwlora.errors import GridError
from qwlora.grid.scheme import Scheme
from qwlora.messages import suggestion
from qwlora.quantize.gptq import GptqSettings
from qwlora.quantize.solvers import SOLVERS


@dataclass(frozen=True)
class Rule:
    """What happens to the layers whose path matches.

    Args:
        match: a glob (`*`, `?`, `[...]`) over the whole canonical module path.
        scheme: their grid; None keeps them float.
        solver: their solver; None for the base's.
    """

    match: str
    scheme: Scheme | None
    solver: str | None = None


@dataclass(frozen=True)
class Assignment:
    """Grid and solver of one tensor, and how that solver goes about it if it is gptq."""

    scheme: Scheme
    solver: str
    gptq: GptqSettings = GptqSettings()


@dataclass(frozen=True)
class Candidate:
    """A tensor that can be packed.

    Args:
        paths: canonical paths of the layers that read it (two if they are tied); of a parameter
            that is no layer's weight, its own path.
        by_default: whether it is quantized where no rule says otherwise.
        calibrated: whether a solver that follows the layer's inputs can solve it (matrices of
            Linear and Conv1D).
    """

    paths: tuple[str, ...]
    by_default: bool
    calibrated: bool


def assign(
    candidates: Mapping[str, Candidate], scheme: Scheme, solver: str, rules: Sequence[Rule]
) -> dict[str, Assignment]:
    """Grid and solver of each tensor that is quantized, in the candidates' order.

    Where the base's own solver follows inputs and a tensor has none to follow (embeddings, kernels,
    fused experts), `search` takes its place.

    Raises:
        GridError: rules match nothing (all are named, with near names), or one gives a tensor a
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
