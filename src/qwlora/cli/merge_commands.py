"""`qwlora merge-check` and `qwlora merge`: measure what merging an adapter loses, then merge it.

    qwlora merge-check DIR NAME
    qwlora merge DIR NAME --into float|requantized --out FOLDER

`merge` prints the same measurements as `merge-check` before it writes anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwlora.cli.progress_bars import ProgressDisplay
from qwlora.cli.shared_arguments import AsJson, Job
from qwlora.cli.terminal import print_result

if TYPE_CHECKING:
    from qwlora.pipeline.commands.merge_adapter import Verdict

Name = Annotated[str, typer.Argument(help="The adapter's name.")]
Target = Annotated[
    str,
    typer.Option(
        "--into",
        help="float: write a float model; requantized: round the merged weights back onto the "
        "base's grid.",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Folder to create for the merged model.")]


def merge_check(job: Job, name: Name, as_json: AsJson = False) -> None:
    """Measure what merging an adapter would lose.

    Merging rounds the sum of base and adapter to the base's integers. Writes nothing.
    """
    from qwlora.pipeline.commands.open_job import open_job

    session, name = open_job(job, name)
    from qwlora.pipeline.commands.merge_adapter import merge_verdict

    with ProgressDisplay(as_json) as display:
        verdict = merge_verdict(session, name, display.track)
    print_result(verdict.to_json(), _lines(verdict), as_json)


def merge(job: Job, name: Name, into: Target, out: Out) -> None:
    """Merge an adapter into its base.

    Reports what that loses. The merge starts from the dequantized base, never from the original
    float weights.
    """
    if into not in ("float", "requantized"):
        raise typer.BadParameter(f"{into!r} is neither float nor requantized", param_hint="--into")
    from qwlora.pipeline.commands.model_folder import new_folder
    from qwlora.pipeline.commands.open_job import open_job
    from qwlora.pipeline.job.output_path import check_outside_data

    with new_folder(out) as folder:
        session, name = open_job(job, name)
        check_outside_data(out, session.recipe)
        from qwlora.pipeline.commands.merge_adapter import merge_verdict, write_merged

        with ProgressDisplay() as display:
            verdict = merge_verdict(session, name, display.track)
        print("\n".join(_lines(verdict)), flush=True)
        write_merged(session, name, into, folder)  # type: ignore[arg-type]
    print(f"wrote {out}")


def _lines(verdict: Verdict) -> list[str]:
    worst = sorted(verdict.layers.items(), key=lambda item: -item[1].share)[:3]
    most = ", ".join(f"{path} {layer.share:.1%}" for path, layer in worst)
    return [
        f"{verdict.share:.1%} of the adapter's weight changes are smaller than half a quantization "
        f"step of the base (most in {most})",
        f"perplexity: base {verdict.base:.3f}, with the adapter {verdict.adapted:.3f}, merged into "
        f"the integers {verdict.merged:.3f}",
        "the adapter does not improve perplexity on this text"
        if verdict.kept is None
        else f"the merged integers keep {verdict.kept:.1%} of the adapter's improvement",
        verdict.recommendation(),
    ]
