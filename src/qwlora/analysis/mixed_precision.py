"""Mixed precision: the fewest activations on a wide grid that keep a measure within a limit.

    rank       all on the narrow grid, by the cost of `quantization_costs.py`
    promote    the k most costly to the wide grid: the smallest k with `measure() <= limit`, by
               bisection
    demote     groups of promoted activations (same name in any layer) back to the narrow grid where
               the limit still holds, least costly first

Measurements decide; the ranking only orders the search. Bisection assumes that the measure falls
with k, so the result satisfies the limit but may not be minimal. Bitwidths that a user's rule or
an earlier calibration fixed do not change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwlora.analysis.quantization_costs import sensitivities
from qwlora.errors import CalibrationError
from qwlora.simulation.placement_rules import PlacementRule
from qwlora.simulation.simulation import Simulation
from qwlora.system.progress import Track, untracked


@dataclass(frozen=True)
class Suggestion:
    """The result of a search, which the simulation has afterwards.

    The rules create it in a simulation with narrow activations; append them to its other rules.
    """

    wide: tuple[str, ...]  # names of the activations on the wide grid, in graph order
    narrow: int  # number of activations on the narrow grid
    kept: int  # number of activations that were not searched
    rules: tuple[PlacementRule, ...]
    measured: float  # the measure of the assignment
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
    track: Track = untracked,
) -> Suggestion:
    """Search for an assignment of bitwidths and apply it to a calibrated simulation.

    Args:
        batches: see `sensitivities`.
        measure: what to keep within `limit`, smaller is better; for example the simulation's
            perplexity. It is called several dozen times.
        narrow, wide: bitwidths.
    """
    ruled = {mark.name for mark in simulation.marks if mark.ruled}
    searched = [n for n, q in simulation.quantizers.items() if not q.fixed and n not in ruled]
    known: dict[frozenset[str], float] = {}

    def measured(names: Sequence[str]) -> float:
        """The measure with `names` on the wide grid and the rest on the narrow one."""
        chosen = frozenset(names)
        for name in searched:
            quantizer = simulation.quantizers[name]
            scheme = replace(quantizer.scheme, bitwidth=wide if name in chosen else narrow)
            if quantizer.scheme != scheme:  # setting it drops the encoding
                quantizer.scheme = scheme
        simulation.freeze()
        if chosen not in known:
            known[chosen] = measure()
        return known[chosen]

    all_wide = measured(searched)
    if not all_wide <= limit:
        raise CalibrationError(
            f"with every activation at {wide} bits the measure is {all_wide:.5g}, above the limit "
            f"of {limit:.5g}. Raise the limit, or keep the most costly activations float "
            "(simulation.rules with keep: float)"
        )
    all_narrow = measured([])
    ranking = [s.name for s in sensitivities(simulation, batches, track=track)]
    ranking = [name for name in ranking if name in set(searched)]
    chosen = _promote(ranking, lambda names: measured(names) <= limit, track)
    chosen = _demote(chosen, lambda names: measured(names) <= limit, track)
    result = measured(chosen)  # sets it
    values = {v.name: v.names for v in simulation.placement.values if v.name in set(searched)}
    return Suggestion(
        tuple(name for name in searched if name in set(chosen)),
        len(searched) - len(chosen),
        len(simulation.quantizers) - len(searched),
        rules_for(chosen, values, narrow, wide),
        result,
        all_narrow,
        all_wide,
        limit,
    )


def _promote(
    ranked: list[str], keeps_limit: Callable[[Sequence[str]], bool], track: Track
) -> list[str]:
    """The shortest prefix of `ranked` that keeps the limit."""
    too_few, enough = -1, len(ranked)
    halvings = (enough - too_few - 1).bit_length()
    for _ in track(range(halvings), "promoting", halvings):
        if enough - too_few == 1:
            break
        middle = (too_few + enough) // 2
        if keeps_limit(ranked[:middle]):
            enough = middle
        else:
            too_few = middle
    return ranked[:enough]


def _demote(
    promoted: list[str], keeps_limit: Callable[[Sequence[str]], bool], track: Track
) -> list[str]:
    """`promoted` without groups that can be narrow; the lowest-ranked are tried first."""
    groups = list(_by_kind(promoted).values())
    groups.sort(key=lambda names: -min(promoted.index(name) for name in names))
    for group in track(groups, "demoting", len(groups)):
        fewer = [name for name in promoted if name not in set(group)]
        if keeps_limit(fewer):
            promoted = fewer
    return promoted


def rules_for(
    chosen: Collection[str], names: Mapping[str, tuple[str, ...]], narrow: int, wide: int
) -> tuple[PlacementRule, ...]:
    """Rules that make `chosen` wide and everything else narrow.

    One glob covers a value of all layers where it matches no other value. The name of the first
    value of a module and operator (`model.layers.0.mlp.mul`) also matches the next (`mul_1`), so
    exceptions for narrow ones come first.

    Args:
        names: by value, the names that a glob matches.
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
        for rule in (PlacementRule(name, bitwidth=wide) for name in among):
            rules.append(rule)
            exceptions |= {
                name: PlacementRule(name, bitwidth=narrow)
                for name, fitting in names.items()
                if name not in chosen and rule.fits(fitting)
            }
    return (*exceptions.values(), *rules)


def _by_kind(names: Sequence[str]) -> dict[str, list[str]]:
    """Names grouped by a glob that replaces the layer number."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return kinds
