"""Which stages are current, and why the others are not.

A stage is current if it ran with the inputs of the plan, its files are there and unchanged, and all
stages that it needs are current, all the way up. Free of torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwlora.pipeline.directory import Directory
from qwlora.pipeline.stage import Stage


def find_stale(
    plan: Sequence[Stage], directory: Directory, whatever_inputs: bool = False
) -> dict[str, str]:
    """The stages of `plan` that are not current, each with the reason, in the order of the plan.

    Args:
        whatever_inputs: do not ask whether a stage ran with the inputs of the plan, but only
            whether what it made is there and unchanged.
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
    """The stage `name` and all that it needs, all the way up, in the order of the plan."""
    found = {name}
    for stage in reversed(plan):
        if stage.name in found:
            found |= set(stage.needs)
    return [stage for stage in plan if stage.name in found]
