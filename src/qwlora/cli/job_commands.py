"""Commands for an existing job: `report`, `push` and `merge`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qwlora.cli.shared_arguments import AsJson, Device, Job, Name, Yes
from qwlora.cli.terminal import ProgressDisplay, print_result
from qwlora.errors import UploadError, size
from qwlora.formats.model_source import is_hub_id
from qwlora.system.atomic import total_bytes


def report(
    jobs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Job directories.")],
) -> None:
    """Rebuild the report.html of each job.

    Outdated results are left out.
    """
    from qwlora.pipeline.results import rebuild_reports

    for path in rebuild_reports(jobs):
        print(path)


def push(
    job: Job,
    repository: Annotated[
        str,
        typer.Option("--to", metavar="OWNER/NAME", help="The repository, created if needed."),
    ],
    adapter: Annotated[
        str | None, typer.Option(help="The adapter to upload. Default: the base.")
    ] = None,
    public: Annotated[
        bool,
        typer.Option("--public", help="Allow a public repository. Default: private."),
    ] = False,
    license: Annotated[
        str | None,
        typer.Option(
            help="License for the model card, such as apache-2.0. Default for a base: the model's."
        ),
    ] = None,
    yes: Yes = False,
) -> None:
    """Upload the base or an adapter, with its exported files, to the Hugging Face hub.

    Asks first. Uses the token of `hf auth login` or HF_TOKEN.
    """
    if not is_hub_id(repository):
        raise typer.BadParameter(f"{repository!r} is not OWNER/NAME", param_hint="--to")
    from qwlora.pipeline.commands.push import prepared, send
    from qwlora.report.model_cards import QUOTED

    with prepared(job, repository, adapter, license) as upload:
        files = f"{len(upload.files)} files, {size(total_bytes(upload.files.values()))}"
        kind = "public" if public else "private"
        print(f"{upload.what}: {files}, to {repository} ({kind})")
        for name in sorted(upload.files):
            print(f"  {name}")
        for name in upload.outdated:
            print(f"  {name} will be deleted there: it is from an earlier upload of this job")
        for note in upload.notes:
            print(f"note: {note}")
        print(f"data: {QUOTED}")
        if not yes:
            if not sys.stdin.isatty():
                raise UploadError("nothing was uploaded; confirm with --yes")
            typer.confirm("Upload?", abort=True)
        print(send(upload, job, is_private=not public))


def merge(
    job: Job,
    name: Name,
    into: Annotated[
        Literal["float", "requantized"] | None,
        typer.Option(
            help="Write the merged model to --out: float, or requantized to the base's grid. "
            "Default: only measure."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to create.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure what merging an adapter into the base loses, and write the merged model."""
    if (into is None) != (out is None):
        raise typer.BadParameter("the merged model needs both --into and --out")
    from qwlora.pipeline.commands.open_job import open_job
    from qwlora.recipe.implied import check_outside_data
    from qwlora.system.output_path import new_folder

    # The folder is checked and locked before the minutes that loading a model may take.
    with new_folder(out) if out else nullcontext() as folder:
        opened, name = open_job(job, name, device=device)
        context = opened.new_context()
        if out is not None:
            check_outside_data(out, context.recipe)
        from qwlora.pipeline.commands.write_model import merge_verdict, write_merged

        with ProgressDisplay(as_json) as display:
            verdict = merge_verdict(context, name, display.track)
        print_result(verdict, merge_lines(verdict), as_json)
        # Writing the model may take minutes, so what a merge loses is shown before it.
        sys.stdout.flush()
        if into is not None and folder is not None:
            write_merged(context, name, into, folder)
    if out is not None and not as_json:
        print(f"wrote {out}")


def merge_lines(effect: Mapping[str, Any]) -> list[str]:
    """What a merge loses, in words."""
    # `merge_verdict` gives no layers for a mergeable adapter, which loses nothing.
    worst = sorted(effect["layers"].items(), key=lambda item: -item[1]["share"])[:3]
    most = ", ".join(f"{path} {layer['share']:.1%}" for path, layer in worst)
    return [
        f"{effect['share']:.1%} of the adapter's weight changes are smaller than half a "
        f"quantization step of the base (most in {most})"
        if worst
        else "the adapter is mergeable: it was trained on the integers that merging writes",
        f"perplexity: base {effect['base']:.3f}, with the adapter {effect['adapted']:.3f}, merged "
        f"into the integers {effect['merged']:.3f}",
        "the adapter does not improve perplexity on this text"
        if effect["kept"] is None
        else f"the merged integers keep {effect['kept']:.1%} of the adapter's improvement",
        effect["recommendation"],
    ]
