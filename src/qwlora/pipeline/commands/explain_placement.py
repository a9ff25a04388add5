"""The placement log of a job's simulation, for `qwlora simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.pipeline.commands.open_job import is_calibrated, open_job

if TYPE_CHECKING:
    from qwlora.simulation.placement import PlacementLog


def explain_placement(
    folder: Path, adapter: str | None = None, changes: tuple[str, ...] = ()
) -> tuple[str, PlacementLog]:
    """The adapter's name and its placement log: which values are quantized, and why.

    Includes calibration results if the job is calibrated and there are no `changes`.

    Args:
        adapter: default: the first in the recipe.
        changes: changes to the recipe, see `load_recipe`; nothing is written.

    Raises:
        DirectoryError: the folder is not a job directory, or has no such trained adapter.
        CalibrationError: a rule has no effect, or the calibration is out of date (see
            `is_calibrated`).
    """
    context, name = open_job(folder, adapter, changes)
    simulation = (
        context.simulation(name)
        if not changes and is_calibrated(context, name)
        else context.new_simulation(name)
    )
    return name, simulation.explain()
