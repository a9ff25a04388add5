"""Finds placement rules that have no effect in a job, before anything is trained.

A rule may concern values that only some of the job's graphs have, like the weights of one adapter.
So a rule is an error only if it has no effect in any graph. Graphs are captured with untrained
adapters, and only until every rule has had an effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwlora.simulation.placement import Placement, refuse_ineffective_rules


def refuse_unused_rules(known: Sequence[Placement], more: Iterator[Placement]) -> None:
    """Check that every rule has an effect in some graph of the job.

    Args:
        known: placements of graphs that were captured anyway.
        more: placements of all graphs of the job, captured lazily.

    Raises:
        CalibrationError: names all rules without effect.
    """
    placements = list(known)
    while not _all_used(placements):
        placement = next(more, None)
        if placement is None:
            refuse_ineffective_rules(placements)
            return
        placements.append(placement)


def _all_used(placements: Sequence[Placement]) -> bool:
    unused = [set(placement.unused_rules) for placement in placements]
    return bool(unused) and not set.intersection(*unused)
