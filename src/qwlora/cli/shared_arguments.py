"""Arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Job = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="A job's directory, with its base and adapters.", show_default=False
    ),
]
RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
