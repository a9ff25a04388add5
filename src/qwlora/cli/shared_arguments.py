"""Arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Job = Annotated[Path, typer.Argument(metavar="DIR", help="A job's directory.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe, such as base.weights=w3-block32. Repeatable.",
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
        help="float, base, an adapter's name, simulated/NAME, or exported files such as onnx/NAME; "
        "simulated or onnx alone means the first. Default: the first adapter; of `score`, all "
        "whose runtime is installed.",
    ),
]
# Flags have their names here, because typer adds an opposite (`--no-json`) to those without one.
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Name = Annotated[str, typer.Argument(help="The adapter's name.")]
