"""Finds the stages that are out of date, and why. Imports no torch.

A stage is current if it ran with the inputs of the plan, its files exist unmodified, and all stages
that it needs, directly or indirectly, are current.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.plan.stage import Stage


def find_stale(
    plan: Sequence[Stage], directory: Directory, whatever_inputs: bool = False
) -> dict[str, str]:
    """The stages of `plan` that are not current and the reason for each, in the order of the plan.

    Args:
        whatever_inputs: check only that the stages' files exist unmodified, not that the inputs are
            those of the plan.
    """
    stale: dict[str, str] = {}
    for stage in plan:
        reason = directory.problem(stage.name, None if whatever_inputs else stage.key)
        if reason is None and (needs := [need for need in stage.needs if need in stale]):
            reason = f"reads {', '.join(needs)}"
        if reason is not None:
            stale[stage.name] = reason
    return stale


def upstream(plan: Sequence[Stage], name: str) -> list[Stage]:
    """The stage `name` and all it needs, directly or indirectly, in the order of the plan."""
    found = {name}
    for stage in reversed(plan):
        if stage.name in found:
            found |= set(stage.needs)
    return [stage for stage in plan if stage.name in found]
