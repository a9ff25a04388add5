"""`qwlora base import`: write the integers of a quantized checkpoint as a base folder.

    qwlora base import model-Q4_0.gguf --out base
    qwlora base import float-model --encodings model.encodings --out base

The same as a recipe with `base.solver: keep`, without a job around it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwlora.cli.progress_bars import ProgressDisplay

app = typer.Typer(name="base", help="Make a base folder without a recipe.", no_args_is_help=True)


@app.callback()
def _base() -> None:
    """Keeps `import` a subcommand while it is the only one."""


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="A .gguf file, a GPTQ, AWQ, compressed-tensors or MLX folder, or, with "
            "--encodings, a float checkpoint. A path or a hub id, as for model.source."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to create.")],
    encodings: Annotated[
        Path | None,
        typer.Option(
            help="AIMET encodings of a float checkpoint whose weights already lie on their grid."
        ),
    ] = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            help="With --encodings: glob of parameters or layers that stay float. May be repeated."
        ),
    ] = None,
) -> None:
    """Write the integers of a quantized checkpoint as a base folder.

    The integers are kept bit for bit; nothing is rounded. The folder loads with
    AutoModelForCausalLM.from_pretrained after `import qwlora.hf`, and as model.source of a recipe.
    """
    from qwlora.pipeline.commands.model_folder import new_folder

    with new_folder(out) as folder, ProgressDisplay() as display:
        from qwlora.pipeline.commands.import_base import import_base

        fingerprint, size = import_base(
            source, folder, encodings, keep_float=keep_float or (), track=display.track
        )
    print(
        f"wrote {out}: {size.weights:,} packed weights with {size.bits_per_weight:.2f} bits each, "
        f"{size.float_weights:,} float, fingerprint {fingerprint}"
    )
    print(f"Train adapters on it: model.source: {out} and base.solver: keep in a recipe")
