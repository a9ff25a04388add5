"""`qwlora dump-layers DIR`: every layer's output of an exported model, as .npy files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwlora.cli.progress_bars import ProgressDisplay
from qwlora.cli.shared_arguments import AdapterName, Job

StageName = Annotated[
    str | None,
    typer.Option(
        "--stage",
        help="onnx, aimet, qairt, qnn, or simulated, which writes no values of a runtime. Default: "
        "the first of these in export.targets.",
    ),
]
Ids = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Token ids, a .npy file of integers [tokens]. Shorter sequences than the files take "
        "are padded on the right. Default: the first held-out sequence of the job.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="The folder to write, which must not exist. Default: layers/STAGE/NAME in the job."
    ),
]


def dump_layers(
    job: Job, adapter: AdapterName = None, stage: StageName = None, ids: Ids = None, out: Out = None
) -> None:
    """Write every layer's output, to compare with a device.

    What the simulation computes, and what ONNX Runtime computes from the exported files on the CPU.
    layers.json lists the tensors, with their names in the files and those of their encodings.
    """
    from qwlora.pipeline.commands.dump_layers import dump_layers as dump

    with ProgressDisplay(False) as display:
        folder, record = dump(job, stage, adapter, ids, out, display.track)
    both = sum(1 for layer in record["layers"] if layer["simulated"] and layer["runtime"])
    print(
        f"{folder}: {len(record['layers'])} layers of {record['stage']}/{record['use_case']} for "
        f"{record['tokens']} tokens, {both} of them simulated and from the runtime"
    )
