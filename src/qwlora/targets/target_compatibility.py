"""Which targets hold the integers of which scheme, known before anything runs. Imports no torch.

    holds          the files hold codes, scales and offsets exactly
    another        they would with the nearest other scheme
    cannot         they would with no scheme

The nearest scheme has the closest bitwidth (more bits win a tie), then the same symmetry, then the
closest block size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from qwlora.grid.scheme import (
    Bf16Block,
    Blocks,
    Granularity,
    PerBlock,
    PerChannel,
    PerTensor,
    Scheme,
)
from qwlora.grid.scheme import short_name as named
from qwlora.quantize.solvers import ROUNDING_SOLVERS
from qwlora.targets.target import LayerKind, Target

_SIZES = (32, 64, 128)
# The last are named where no other is as near.
_GRANULARITIES: tuple[Granularity, ...] = (
    *map(PerBlock, _SIZES),
    PerChannel(),
    PerTensor(),
    *map(Bf16Block, _SIZES),
)


@dataclass(frozen=True)
class Grid:
    """A grid of a base.

    Args:
        solver: chooses its numbers; None if they exist already, keep if they are not float16.
        of_embedding: whether embeddings alone have it.
    """

    scheme: Scheme
    solver: str | None
    of_embedding: bool = False


def refusals(
    target: Target,
    grids: Collection[Grid] = (),
    source: Path | None = None,
    keeps: bool = False,
    kinds: Mapping[LayerKind, Sequence[str]] | None = None,
    embedding: tuple[str, Scheme | None] | None = None,
) -> list[str]:
    """Why a target cannot hold a base, by what is known of it yet; empty if it can.

    Args:
        grids: of its weights.
        source: the file or folder of the model.
        keeps: whether the integers of `source` are taken unchanged.
        kinds: names of its packed weights, by the kind of their layer.
        embedding: path of the embedding, and its scheme; None: it stays float.
    """
    reasons = list[str]()
    if not is_copied(target, source, keeps):
        reasons += filter(None, (grid_problem(target, grid) for grid in grids))
        schemes = {grid.scheme for grid in grids if not _is_float(target, grid)}
        if not reasons and (conflict := target.conflict(schemes)):
            reasons.append(conflict)
    for kind, names in (kinds or {}).items():
        if reason := target.kind_problem(kind):
            reasons.append(f"{reason}: {names[0]}, {len(names)} weights in all")
    if target.embedding_problem is not None and embedding is not None:
        path, scheme = embedding
        reason = f"{path} stays float" if scheme is None else target.embedding_problem(scheme)
        rule = f"Add to base.rules, first: {{match: '{path}', bitwidth: 8, granularity: tensor}}"
        rule = "Quantize the model again" if keeps else rule
        if reason:
            reasons.append(f"{reason}, and the HTP reads its rows with one scale. {rule}")
    return reasons


def is_copied(target: Target, source: Path | None, keeps: bool) -> bool:
    """Whether the target writes the model's own file, whatever its grids."""
    return keeps and comes_from(target, source)


def comes_from(target: Target, source: Path | None) -> bool:
    """Whether `source` is a file of the target's own format."""
    return source is not None and source.suffix == target.source_suffix != ""


def _is_float(target: Target, grid: Grid) -> bool:
    """Whether the tensors of a grid are written as floats."""
    return grid.of_embedding and target.writes_float_embeddings


def grid_problem(target: Target, grid: Grid) -> str | None:
    """Why a target cannot hold a grid; None if it can."""
    if _is_float(target, grid):
        return None
    for_embedding = target.embedding_problem or target.scheme_problem
    if reason := (for_embedding if grid.of_embedding else target.scheme_problem)(grid.scheme):
        return reason
    if target.has_float16_scales and grid.solver is not None:
        if not grid.scheme.has_free_scales:
            return f"{grid.scheme}: its scales are float32, and the files hold float16"
        if grid.solver not in ROUNDING_SOLVERS:
            return (
                f"{grid.scheme}: solver {grid.solver} leaves scales in float32, and the files hold "
                f"float16; {', '.join(ROUNDING_SOLVERS)} round them"
            )
    return None


def nearest(scheme: Scheme, targets: Collection[Target]) -> Scheme:
    """The scheme closest to `scheme` that all targets hold: each holds w4-bf16block32."""
    asked = scheme.granularity
    granularities = [*_GRANULARITIES, asked]
    if isinstance(asked, Blocks):
        granularities.append(PerBlock(asked.size))
    candidates = [
        Scheme(bitwidth, symmetric, granularity)
        for bitwidth, symmetric, granularity in product(range(2, 9), (True, False), granularities)
        if symmetric or not (isinstance(granularity, Blocks) and granularity.is_only_symmetric)
    ]
    held = [c for c in candidates if not any(grid_problem(t, Grid(c, "search")) for t in targets)]
    return min(held, key=lambda found: _distance(scheme, found))


def refusal(grids: Collection[Grid], targets: Mapping[str, Target]) -> str | None:
    """Why `targets` cannot hold a base with these grids, and what they can; None if they can."""
    lacking = "; ".join(
        f"{name} cannot hold {found}"
        for name, target in targets.items()
        for found in refusals(target, grids)
    )
    if not lacking:
        return None
    kinds, asked = list(targets.values()), [grid.scheme for grid in grids]
    best = [nearest(scheme, kinds) for scheme in asked]
    if any(target.conflict(set(best)) for target in kinds):  # symmetric ones have none
        best = [nearest(Scheme(s.bitwidth, True, s.granularity), kinds) for s in asked]
    moved = dict(zip(asked, best, strict=True))
    remedies = [f"{named(new)} instead of {named(s)}" for s, new in moved.items() if new != s]
    rounds = all(grid.solver in (None, *ROUNDING_SOLVERS) for grid in grids)
    if not rounds and any(target.has_float16_scales for target in kinds):
        remedies.append(f"solver {' or '.join(ROUNDING_SOLVERS)}")
    together = " and ".join(targets)
    return f"{lacking}. The nearest that {together} can hold: {', '.join(remedies)}"


def table_rows(
    grids: Mapping[Grid, str],
    targets: Mapping[str, Target],
    chosen: Collection[str],
    copying: Collection[str] = (),
) -> Iterator[tuple[str, ...]]:
    """A header and a row for each grid.

    Args:
        grids: what they are for, in words.
        chosen: targets of the recipe, which get an asterisk.
        copying: targets that write the model's own file.
    """
    names = [f"{name}*" if name in chosen else name for name in targets]
    conflicts = {
        name
        for name, target in targets.items()
        if target.conflict({g.scheme for g in grids if not _is_float(target, g)})
    }
    yield "grid", "of", *names
    for grid, place in grids.items():
        cells = []
        for name, target in targets.items():
            if name in copying:
                cells.append("holds")
            elif grid_problem(target, grid) is None:
                cells.append("not together" if name in conflicts else "holds")
            elif grid.solver in (None, "keep"):
                cells.append("cannot")
            else:
                best = nearest(grid.scheme, [target])
                cells.append("other solver" if best == grid.scheme else named(best))
        yield named(grid.scheme), place, *cells


def _distance(asked: Scheme, found: Scheme) -> tuple[float, ...]:
    bits = found.bitwidth - asked.bitwidth
    of_block = 0.0
    if asked.granularity != found.granularity:
        sizes = [s.granularity.size for s in (asked, found) if isinstance(s.granularity, Blocks)]
        of_block = 1 + (abs(math.log2(sizes[0] / sizes[1])) if len(sizes) == 2 else 20)
    return abs(bits), bits < 0, found.symmetric != asked.symmetric, of_block
