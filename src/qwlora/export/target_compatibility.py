"""Which targets hold the integers of which scheme, known before anything runs. Imports no torch.

    holds          the files hold codes, scales and offsets exactly
    another        they would with the nearest other scheme
    cannot         they would with no scheme

The nearest scheme has the closest bitwidth (more bits win a tie), then the same symmetry, then the
closest block size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from qwlora.export.target import Target
from qwlora.grid.scheme import Blocks, Granularity, Lpbq, PerBlock, PerChannel, PerTensor, Scheme
from qwlora.grid.scheme import short_name as named

ROUNDING_SOLVERS = ("search", "sqnr", "gptq")  # they round scales of blocks to float16
_GRANULARITIES = (PerBlock(32), PerBlock(64), PerBlock(128), PerChannel(), PerTensor())


@dataclass(frozen=True)
class Grid:
    """A grid of a base.

    Args:
        solver: chooses its numbers; None if they exist already.
        of_embedding: whether embeddings alone have it.
    """

    scheme: Scheme
    solver: str | None
    of_embedding: bool = False


def problem(target: Target, grid: Grid) -> str | None:
    """Why a target cannot hold a grid; None if it can."""
    if grid.of_embedding and target.writes_float_embeddings:
        return None
    holds = target.embedding_problem if grid.of_embedding else target.problem
    if found := holds(grid.scheme):
        return found
    if target.has_float16_scales and grid.solver is not None:
        if not isinstance(grid.scheme.granularity, PerBlock):
            return f"{grid.scheme}: its scales are float32, and the files hold float16"
        if grid.solver not in ROUNDING_SOLVERS:
            return (
                f"{grid.scheme}: solver {grid.solver} leaves scales in float32, and the files hold "
                f"float16; {', '.join(ROUNDING_SOLVERS)} round them"
            )
    return None


def nearest(scheme: Scheme, targets: Collection[Target]) -> Scheme | None:
    """The scheme closest to `scheme` that all targets hold; None if there is none."""
    candidates = [
        Scheme(bitwidth, symmetric, granularity)
        for bitwidth, symmetric, granularity in product(
            range(2, 9), (True, False), (*_GRANULARITIES, scheme.granularity)
        )
        if symmetric or not isinstance(granularity, Lpbq)
    ]
    held = [c for c in candidates if not any(problem(t, Grid(c, "search")) for t in targets)]
    return min(held, key=lambda found: _distance(scheme, found), default=None)


def refusal(grids: Collection[Grid], targets: Mapping[str, Target]) -> str | None:
    """Why `targets` cannot hold a base with these grids, and what they can; None if they can."""
    lacking = [
        f"{name} cannot hold {found}"
        for name, target in targets.items()
        for found in problems(target, grids)
    ]
    if not lacking:
        return None
    moved = _moved(grids, list(targets.values()))
    if None in moved.values():
        together = " and ".join(targets)
        return f"{'; '.join(lacking)}. No scheme suits {together}; export them from different jobs"
    remedies = [
        f"{named(best)} instead of {named(asked)}"
        for asked, best in moved.items()
        if best is not None and best != asked
    ]
    rounds = all(grid.solver in (None, *ROUNDING_SOLVERS) for grid in grids)
    if not rounds and any(target.has_float16_scales for target in targets.values()):
        remedies.append(f"solver {' or '.join(ROUNDING_SOLVERS)}")
    return (
        f"{'; '.join(lacking)}. The nearest that {' and '.join(targets)} can hold: "
        f"{', '.join(remedies)}"
    )


def table_rows(
    grids: Mapping[Grid, str],
    targets: Mapping[str, Target],
    chosen: Collection[str],
    keeping: Collection[str] = (),
) -> Iterator[tuple[str, ...]]:
    """A header and a row for each grid.

    Args:
        grids: what they are for, in words.
        chosen: targets of the recipe, which get an asterisk.
        keeping: targets that write the model's own file.
    """
    names = [f"{name}*" if name in chosen else name for name in targets]
    apart = {
        name
        for name, target in targets.items()
        if name not in keeping and target.conflict({g.scheme for g in _integers(target, grids)})
    }
    yield "grid", "of", *names
    for grid, place in grids.items():
        cells = []
        for name, target in targets.items():
            if name in keeping or problem(target, grid) is None:
                cells.append("not together" if name in apart else "holds")
            elif grid.solver is not None and (best := nearest(grid.scheme, [target])):
                again = "other solver" if best == grid.scheme else named(best)
                cells.append(again)
            else:
                cells.append("cannot")
        yield named(grid.scheme), place, *cells


def problems(target: Target, grids: Collection[Grid]) -> list[str]:
    """Why a target cannot hold a base with these grids; empty if it can."""
    found = [p for grid in grids if (p := problem(target, grid)) is not None]
    if not found and (conflict := target.conflict({g.scheme for g in _integers(target, grids)})):
        found.append(conflict)
    return found


def _integers(target: Target, grids: Collection[Grid]) -> list[Grid]:
    """The grids whose tensors the target writes as integers."""
    return [g for g in grids if not (g.of_embedding and target.writes_float_embeddings)]


def _moved(grids: Collection[Grid], targets: Collection[Target]) -> dict[Scheme, Scheme | None]:
    """The nearest scheme that all targets hold for each grid; if the results conflict with each
    other, symmetric ones, and if these do too, the one with the most bits for all."""
    schemes = [grid.scheme for grid in grids]
    symmetric = [Scheme(s.bitwidth, True, s.granularity) for s in schemes]
    widest = max(symmetric, key=lambda scheme: scheme.bitwidth)
    for wanted in (schemes, symmetric, [widest] * len(schemes)):
        found = [nearest(scheme, targets) for scheme in wanted]
        held = {scheme for scheme in found if scheme is not None}
        if not any(target.conflict(held) for target in targets):
            break
    return dict(zip(schemes, found, strict=True))


def _distance(asked: Scheme, found: Scheme) -> tuple[float, ...]:
    bits = found.bitwidth - asked.bitwidth
    return (
        abs(bits),
        bits < 0,
        found.symmetric != asked.symmetric,
        *_apart(asked.granularity, found.granularity),
    )


def _apart(asked: Granularity, found: Granularity) -> tuple[float, ...]:
    if asked == found:
        return 0, 0
    sizes = [g.size for g in (asked, found) if isinstance(g, Blocks)]
    return 1, abs(math.log2(sizes[0] / sizes[1])) if len(sizes) == 2 else 20
