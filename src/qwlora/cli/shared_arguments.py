"""Arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwlora.errors import DirectoryError
from qwlora.pipeline.store import check_job

RECIPE, OUT = Path("recipe.yaml"), Path("out")
RecipeFile = Annotated[
    Path, typer.Argument(metavar="DIR|RECIPE", help="A recipe, or a job's directory.")
]
Out = Annotated[
    Path | None,
    typer.Option(help="The job's directory, created if needed. Default: out."),
]
Job = Annotated[Path, typer.Argument(metavar="DIR", help="A job's directory.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe key, such as base.weights=w3-block32. Repeatable.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="auto|cpu|cuda[:N]|mps|xpu",
        help="Where models compute. Default: the recipe's device.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The model, named as for `qwlora generate --models`. Default: the first adapter.",
    ),
]
Models = Annotated[
    str | None,
    typer.Option(
        "--models",
        metavar="MODEL,MODEL,...",
        help="float, base, an adapter's name, simulated/NAME, or exported files such as gguf/NAME "
        "or gguf/base. Default: the first adapter; for `score`: all that can run here.",
    ),
]
# Flags have their names here, because typer adds an opposite (`--no-json`) to those without one.
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")]
Name = Annotated[str, typer.Argument(help="The adapter's name.")]


def recipe_and_job(recipe: Path, out: Path | None) -> tuple[Path, Path]:
    """The recipe's file and the job's directory that the arguments of a command stand for."""
    if recipe.is_dir():
        if out is not None:
            raise DirectoryError(f"{str(recipe)!r} is a directory; with --out, give a recipe file")
        check_job(recipe)
        return recipe / "recipe.yaml", recipe
    # A job's own recipe is that of its directory, not of another job.
    is_own = (recipe.parent / ".qwlora").is_dir()
    return recipe, out or (recipe.parent if is_own else OUT)
