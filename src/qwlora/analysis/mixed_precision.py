"""Mixed precision under a target: as many activations as possible on a narrow grid, the fewest on a wide one, with the loss within a limit.

    rank        all on the narrow grid; each one's cost by `sensitivity.py`
    promote     the k dearest go to the wide grid; the least k with `measure() <= limit`, by bisection
    take back   groups of alike values among the promoted (one name, any layer), the cheapest group first, go back to the narrow grid if the limit still holds

What `measure` says decides; the ranking only orders the search. Bisection takes the measure to fall with k, which it does but for noise, so what is returned is
what was measured last within the limit, not a proved minimum. Only bitwidths are changed, and none that a user's rule decided about or that was fixed before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwlora.analysis.sensitivity import Loss, sensitivities
from qwlora.errors import CalibrationError
from qwlora.progress import Track, untracked
from qwlora.simulation.placement_rules import PlacementRule
from qwlora.simulation.simulation import Simulation


@dataclass(frozen=True)
class Suggestion:
    """A mixed assignment; the simulation it was found on is left in it.

    Args:
        wide: names of the activations on the wide grid, in order of the graph.
        narrow: how many are on the narrow one.
        kept: how many were not searched: a user's rule decided about them, or they were fixed before.
        rules: what gives the same to a simulation whose activations are narrow; to stand behind the rules that this one has.
        measured: what `measure` says of the assignment, and of all-narrow and all-wide.
        limit: what was asked for.
    """

    wide: tuple[str, ...]
    narrow: int
    kept: int
    rules: tuple[PlacementRule, ...]
    measured: float
    all_narrow: float
    all_wide: float
    limit: float


def suggest(
    simulation: Simulation,
    batches: Collection[Mapping[str, Any]],
    measure: Callable[[], float],
    limit: float,
    narrow: int = 8,
    wide: int = 16,
    loss: Loss | None = None,
    track: Track = untracked,
) -> Suggestion:
    """Find a mixed assignment of `simulation`, which was calibrated, and leave it in it.

    Args:
        batches: what costs are estimated on, see `sensitivities`.
        measure: what is held to `limit`, smaller being better: perplexity of the simulation, say. It is called some dozens of times.
        narrow, wide: bitwidths.

    Raises:
        CalibrationError: the limit does not even hold with everything on the wide grid; the message says what was measured.
    """
    search = _Search(simulation, narrow, wide, measure)
    all_wide = search.measured(search.names)
    if not all_wide <= limit:
        raise CalibrationError(
            f"with every activation at {wide} bits the measure is {all_wide:.5g}, above the limit of {limit:.5g}: no mixture keeps it. "
            "Give a higher limit, or keep what costs most float (simulation.rules with keep: float)"
        )
    all_narrow = search.measured([])
    searched = set(search.names)
    ranking = [
        s.name for s in sensitivities(simulation, batches, loss, track) if s.name in searched
    ]
    promoted = search.promote(ranking, limit, track)
    chosen = search.take_back(promoted, limit, track)
    measured = search.measured(chosen)
    kept = set(chosen)
    wide_names = tuple(name for name in search.names if name in kept)
    names = {
        placed.name: placed.names
        for placed in (*simulation.placement.weights, *simulation.placement.explanation)
        if placed.name in searched
    }
    return Suggestion(
        wide_names,
        len(search.names) - len(kept),
        len(simulation.quantizers) - len(search.names),
        rules_for(kept, names, narrow, wide),
        measured,
        all_narrow,
        all_wide,
        limit,
    )


def rules_for(
    chosen: Collection[str], names: Mapping[str, tuple[str, ...]], narrow: int, wide: int
) -> tuple[PlacementRule, ...]:
    """Rules under which just `chosen` is wide; `names` holds what a glob is matched with, for every value that may be.

    One rule stands for all values of a kind where no other value fits it. The name of the first of several alike values of a module
    (`model.layers.0.mlp.mul`) fits the others too (`mul_1`): those that are narrow are said to be so first.
    """
    exceptions: dict[str, PlacementRule] = {}
    rules = []
    for kind, members in _by_kind(list(names)).items():
        among = [name for name in members if name in chosen]
        everywhere = PlacementRule(kind, bitwidth=wide)
        if len(among) == len(members) and not any(
            everywhere.fits(fitting) for name, fitting in names.items() if name not in chosen
        ):
            rules.append(everywhere)
            continue
        for own in (PlacementRule(name, bitwidth=wide) for name in among):
            rules.append(own)
            exceptions |= {
                name: PlacementRule(name, bitwidth=narrow)
                for name, fitting in names.items()
                if name not in chosen and own.fits(fitting)
            }
    return (*exceptions.values(), *rules)


class _Search:
    """Assignments of one simulation, and what was measured of them."""

    def __init__(
        self, simulation: Simulation, narrow: int, wide: int, measure: Callable[[], float]
    ):
        self.simulation, self.narrow, self.wide, self.measure = simulation, narrow, wide, measure
        ruled = simulation.placement.ruled
        self.names = [
            name for name, q in simulation.quantizers.items() if not q.fixed and name not in ruled
        ]
        self._known: dict[frozenset[str], float] = {}

    def measured(self, wide: Sequence[str]) -> float:
        """The measure with `wide` on the wide grid and the rest on the narrow one; the simulation is left so."""
        chosen = frozenset(wide)
        for name in self.names:
            quantizer = self.simulation.quantizers[name]
            scheme = replace(
                quantizer.scheme, bitwidth=self.wide if name in chosen else self.narrow
            )
            if quantizer.scheme != scheme:
                quantizer.scheme = scheme
        self.simulation.freeze()
        if chosen not in self._known:
            self._known[chosen] = self.measure()
        return self._known[chosen]

    def promote(self, ranked: Sequence[str], limit: float, track: Track) -> list[str]:
        """The fewest of the first in `ranked` that keep the limit."""
        too_few, enough = -1, len(ranked)
        halvings = (enough - too_few - 1).bit_length()
        for _ in track(range(halvings), "promoting", halvings):
            if enough - too_few == 1:
                break
            middle = (too_few + enough) // 2
            if self.measured(ranked[:middle]) <= limit:
                enough = middle
            else:
                too_few = middle
        return list(ranked[:enough])

    def take_back(self, promoted: list[str], limit: float, track: Track) -> list[str]:
        """Groups of alike values that need not be wide after all; the last in the ranking are tried first."""
        groups = list(_by_kind(promoted).values())
        groups.sort(key=lambda names: -min(promoted.index(name) for name in names))
        for group in track(groups, "taking back", len(groups)):
            fewer = [name for name in promoted if name not in set(group)]
            if self.measured(fewer) <= limit:
                promoted = fewer
        return promoted


def _by_kind(names: Sequence[str]) -> dict[str, list[str]]:
    """Names that differ in the number of their layer only, by a glob that matches them all."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return kinds
