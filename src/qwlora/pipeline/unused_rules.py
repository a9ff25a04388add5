"""Placement rules of a job that match nothing are found before anything is trained.

A rule may be about values that only some of the job's graphs have: the weights of an adapter, which
the base alone lacks, or layers that only one adapter is on. So a rule is refused if it does nothing
in any graph. Graphs are captured with untrained adapters, and only until every rule has matched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwlora.simulation.placement import Placement, refuse_idle


def refuse_unused_rules(known: Sequence[Placement], more: Iterator[Placement]) -> None:
    """Refuse rules that match nothing in any graph of the job.

    Args:
        known: placements of graphs that were captured anyway.
        more: placements of all graphs, captured when asked for.

    Raises:
        CalibrationError: rules match nothing in any graph; all are named.
    """
    placements = list(known)
    while not _all_used(placements):
        placement = next(more, None)
        if placement is None:
            refuse_idle(placements)
            return
        placements.append(placement)


def _all_used(placements: Sequence[Placement]) -> bool:
    unused = [set(placement.idle) for placement in placements]
    return bool(unused) and not set.intersection(*unused)
