"""Arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qwlora.errors import SourceError

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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Name = Annotated[str, typer.Argument(help="The adapter's name.")]
Encodings = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="An AIMET encodings file: the grids of a float model's weights."
    ),
]
KeepFloat = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        help="With --encodings: parameters or layers that stay float. Repeatable.",
    ),
]
BlockOrder = Annotated[
    Literal["channel", "tensor"] | None,
    typer.Option(
        help="With --encodings of version 1.0.0: the order of blocks, as model.block_order."
    ),
]
Prefix = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="With --encodings: what only its names, or the model's, start with; see model.prefix.",
    ),
]


def reading_options(
    encodings: Encodings, keep_float: KeepFloat, block_order: BlockOrder, prefix: Prefix
) -> dict[str, Any]:
    """The arguments of `open_checkpoint` that options set."""
    others = {"keep_float": keep_float or (), "block_order": block_order, "prefix": prefix}
    if encodings is None and any(others.values()):
        options = "--keep-float, --block-order and --prefix"
        raise SourceError(f"{options} need --encodings; add it, or remove them")
    return {"encodings": encodings, **others}
