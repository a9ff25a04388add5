"""Commands on a job that exists: `report`, `push`, `merge-check`, `merge` and `dump-layers`; and
`import-base`, which writes the integers of a quantized checkpoint as a base folder. It is the same
as a recipe with `base.solver: keep`, without a job around it.

    qwlora import-base model-Q4_0.gguf --out base
    qwlora import-base float-model --encodings model.encodings --out base
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qwlora.cli.shared_arguments import (
    AsJson,
    BlockOrder,
    Device,
    Encodings,
    Job,
    KeepFloat,
    Name,
    Prefix,
    Yes,
    reading_options,
)
from qwlora.cli.terminal import ProgressDisplay, print_result
from qwlora.errors import UploadError, size


def report(
    jobs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Job directories.")],
    out: Annotated[
        Path,
        typer.Option(help="The page that compares several jobs."),
    ] = Path("comparison.html"),
) -> None:
    """Rebuild report.html of jobs; compare several.

    Needed only after files or the recipe changed: older results are left out.
    """
    from qwlora.pipeline.results.results import rebuild_reports

    for path in rebuild_reports(jobs, out if len(jobs) > 1 else None):
        print(path)


def push(
    job: Job,
    repository: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="OWNER/NAME",
            help="The repository on the hub, created if needed.",
        ),
    ],
    adapter: Annotated[
        str | None, typer.Option(help="The adapter to upload. Default: the base.")
    ] = None,
    public: Annotated[
        bool,
        typer.Option(
            "--public", help="Create a public repository, or upload to one. Default: private."
        ),
    ] = False,
    license: Annotated[
        str | None,
        typer.Option(
            help="License for the model card, as the hub writes it (apache-2.0). Default: for a "
            "base, what the model's files state."
        ),
    ] = None,
    yes: Yes = False,
) -> None:
    """Upload the base or an adapter to the Hugging Face hub.

    With its model card and exported files. Lists the files and asks first. Uses the token of
    `hf auth login` or HF_TOKEN.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        raise typer.BadParameter(f"{repository!r} is not OWNER/NAME", param_hint="--to")
    from qwlora.pipeline.commands.push import prepared, send
    from qwlora.pipeline.results.model_cards import QUOTED

    with prepared(job, repository, adapter, license) as upload:
        kind = "public" if public else "private"
        print(
            f"{upload.what}: {len(upload.files)} files, {size(upload.size_bytes)}, to {repository} "
            f"({kind})"
        )
        for name in sorted(upload.files):
            print(f"  {name}")
        for name in upload.outdated:
            print(f"  {name} is deleted there: an earlier upload of this job")
        for note in upload.notes:
            print(f"note: {note}")
        print(f"data: {QUOTED}")
        if not yes:
            if not sys.stdin.isatty():
                raise UploadError("nothing was uploaded; confirm with --yes")
            typer.confirm("Upload?", abort=True)
        print(send(upload, job, is_private=not public))


def merge_check(job: Job, name: Name, device: Device = None, as_json: AsJson = False) -> None:
    """Measure what merging an adapter into integers would lose."""
    from qwlora.pipeline.commands.open_job import open_job

    opened, name = open_job(job, name, device=device)
    from qwlora.pipeline.commands.write_model import merge_verdict

    with ProgressDisplay(as_json) as display:
        verdict = merge_verdict(opened.new_context(), name, display.track)
    print_result(verdict, merge_lines(verdict), as_json)


def merge(
    job: Job,
    name: Name,
    into: Annotated[
        Literal["float", "requantized"],
        typer.Option(help="float: a float model; requantized: rounded to the base's grid."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    device: Device = None,
) -> None:
    """Merge an adapter into its dequantized base. Also prints what that loses."""
    from qwlora.pipeline.commands.open_job import open_job
    from qwlora.pipeline.job.output_path import check_outside_data, new_folder

    with new_folder(out) as folder:
        opened, name = open_job(job, name, device=device)
        context = opened.new_context()
        check_outside_data(out, context.recipe)
        from qwlora.pipeline.commands.write_model import merge_verdict, write_merged

        with ProgressDisplay() as display:
            verdict = merge_verdict(context, name, display.track)
        print("\n".join(merge_lines(verdict)), flush=True)
        write_merged(context, name, into, folder)
    print(f"wrote {out}")


def merge_lines(effect: Mapping[str, Any]) -> list[str]:
    """What a merge loses, in words."""
    worst = sorted(effect["layers"].items(), key=lambda item: -item[1]["share"])[:3]
    most = ", ".join(f"{path} {layer['share']:.1%}" for path, layer in worst)
    return [
        f"{effect['share']:.1%} of the adapter's weight changes are smaller than half a "
        f"quantization step of the base (most in {most})"
        if worst
        else "the adapter is mergeable: it was trained as the merged integers",
        f"perplexity: base {effect['base']:.3f}, with the adapter {effect['adapted']:.3f}, merged "
        f"into the integers {effect['merged']:.3f}",
        "the adapter does not improve perplexity on this text"
        if effect["kept"] is None
        else f"the merged integers keep {effect['kept']:.1%} of the adapter's improvement",
        effect["recommendation"],
    ]


def dump_layers(
    job: Job,
    model: Annotated[
        str | None,
        typer.Option(
            help="A target with activations and its adapter or use case, such as onnx/first or "
            "qairt/first+second, or simulated/first. A target alone means its first. Default: the "
            "first such target."
        ),
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Token ids, a .npy file of integers [tokens], padded on the right to the length "
            "that the files take. Default: the first held-out sequence.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write, new or empty. Default: layers/MODEL in the job."),
    ] = None,
) -> None:
    """Write every layer's output, to compare with a device.

    From the simulation, and from the exported files in ONNX Runtime on the CPU. layers.json lists
    the tensors, with their names and those of their encodings in the files.
    """
    from qwlora.pipeline.commands.simulate_job import dump_layers as dump

    with ProgressDisplay() as display:
        folder, record = dump(job, model, ids, out, display.track)
    both = sum(1 for layer in record["layers"] if layer["simulated"] and layer["runtime"])
    print(
        f"{folder}: {len(record['layers'])} layers of {record['model']} for {record['tokens']} "
        f"tokens, {both} of them simulated and from the runtime"
    )


def import_base(
    source: Annotated[
        str,
        typer.Argument(
            help="A .gguf file, a GPTQ, AWQ, compressed-tensors or MLX folder, or, with "
            "--encodings, a float checkpoint; as in model.source."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to create.")],
    encodings: Encodings = None,
    keep_float: KeepFloat = None,
    block_order: BlockOrder = None,
    prefix: Prefix = None,
) -> None:
    """Write a quantized checkpoint's integers as a base.

    Nothing is rounded. The folder can be model.source of a recipe, and loads with from_pretrained
    after `import qwlora.hf`.
    """
    from qwlora.pipeline.job.output_path import new_folder

    options = reading_options(encodings, keep_float, block_order, prefix)
    with new_folder(out) as folder, ProgressDisplay() as display:
        from qwlora.pipeline.commands import write_model

        fingerprint, size = write_model.import_base(source, folder, track=display.track, **options)
    print(
        f"wrote {out}: {size.weights:,} packed weights with {size.bits_per_weight:.2f} bits each, "
        f"{size.float_weights:,} float, fingerprint {fingerprint}"
    )
    print(f"Train adapters on it: model.source: {out} and base.solver: keep in a recipe")
