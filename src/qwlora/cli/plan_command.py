"""`qwlora plan RECIPE`: memory and disk of each stage, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwlora.cli.progress_bars import ProgressDisplay
from qwlora.cli.shared_arguments import AsJson, Changes, RecipeFile
from qwlora.cli.terminal import console, print_json
from qwlora.messages import size

if TYPE_CHECKING:
    from qwlora.pipeline.plan.estimates import Estimates
    from qwlora.pipeline.plan.forecast import Forecast

Out = Annotated[
    Path,
    typer.Option(
        "--out", help="Where the job would be written; its free space is compared with the need."
    ),
]


def plan(
    recipe: RecipeFile, changes: Changes = None, out: Out = Path(), as_json: AsJson = False
) -> None:
    """Estimate memory and disk of a recipe's stages.

    Says whether the job fits this machine. Reads the model's configuration and headers, no weights,
    except a few to tell whether they were rounded before.
    """
    from qwlora.recipe import load_recipe

    content = load_recipe(recipe, tuple(changes or ()))
    from qwlora.pipeline.running.new_context import quiet_libraries

    quiet_libraries()
    from qwlora.pipeline.plan.estimates import plan_job

    with ProgressDisplay(as_json) as display:
        found = plan_job(content, out, display.track)
    if as_json:
        print_json(found.to_json())
        return
    from qwlora.pipeline.plan.target_table import second_rounding

    if note := second_rounding(content):
        print(f"warning: {note}\n")
    _print(found, console(width=100))


def _print(found: Estimates, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True, overflow="ellipsis")
    for column in ("peak memory", "disk"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("most of the memory", overflow="fold")
    for stage in found.stages:
        style = "red" if _is_too_large(stage, found) else ""
        table.add_row(
            stage.stage,
            Text(size(int(stage.peak)), style=style),
            size(int(stage.disk)) if stage.disk else "",
            _most(stage),
        )
    console.print(table)
    console.print()
    limit = "" if found.memory_limit is None else f" of {size(found.memory_limit)}"
    console.print(f"memory  {size(int(found.largest.peak))}{limit}, in {found.largest.stage}")
    free = "" if found.disk_free is None else f" of {size(found.disk_free)} free"
    console.print(f"disk    {size(int(found.disk))}{free}")
    console.print()
    if not found.problems:
        console.print("Everything fits.", style="green")
    for problem in found.problems:
        console.print(f"Does not fit: {problem}", style="red")


def _is_too_large(stage: Forecast, found: Estimates) -> bool:
    return found.memory_limit is not None and stage.peak > found.memory_limit


def _most(stage: Forecast) -> str:
    """What holds the most, besides the process itself."""
    parts = {name: count for name, count in stage.memory.items() if name != "process"}
    name = max(parts, key=lambda part: parts[part])
    return f"{name}, {size(int(parts[name]))}"
