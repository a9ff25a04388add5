"""The placement of a job's simulation, for `qwlora simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.pipeline.run_job import is_calibrated, open_job

if TYPE_CHECKING:
    from qwlora.simulation.placement_log import Explanation


def explain_job(
    folder: Path, adapter: str | None = None, changes: tuple[str, ...] = ()
) -> tuple[str, Explanation]:
    """(adapter, what is placed where and why). Where the job is calibrated, and no change is given, what calibration found is in it.

    Args:
        adapter: the recipe's first unless given.
        changes: to the recipe, see `load_recipe`; nothing is written.

    Raises:
        DirectoryError: the folder is no job's directory, or has no such trained adapter.
        CalibrationError: a rule does nothing; or the folder's calibration is of another recipe, see `is_calibrated`.
    """
    context, name = open_job(folder, adapter, changes)
    from qwlora.simulation.placement_log import explain

    simulation = (
        context.simulation(name)
        if not changes and is_calibrated(context, name)
        else context.new_simulation(name)
    )
    return name, explain(simulation, context.recipe.simulation.policy)
