"""`qwlora inspect`: describe a model's files, an adapter or a job without loading the model.

    model or frozen base       shape, grid and bits per weight of every tensor, similar ones grouped
    float model + encodings    the grids that an AIMET encodings file gives it
    adapter                    its size, and the base it was trained on
    job directory              its base and adapters, and whether they belong together

A model is a folder (float, GPTQ, AWQ, compressed-tensors, MLX), a .gguf file or package:NAME/PATH.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwlora.cli.shared_arguments import AsJson, Encodings, KeepFloat
from qwlora.cli.terminal import group_similar, print_result, table
from qwlora.errors import SourceError, size

if TYPE_CHECKING:
    from qwlora.analysis.inspect_model import Inspection, TensorView


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            help="A model's folder or .gguf file, package:NAME/PATH for a file in an installed "
            "package, a frozen base, an adapter, or a job's directory."
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The float model to compare with; adds the SQNR of every tensor. Reads both in "
            "full.",
        ),
    ] = None,
    encodings: Encodings = None,
    keep_float: KeepFloat = None,
    block_order: Annotated[
        Literal["channel", "tensor"] | None,
        typer.Option(
            help="With --encodings: how a file of version 1.0.0 orders blocks, like "
            "model.block_order in a recipe."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Describe a model, an adapter or a job.

    Shows shapes, grids, bits per weight and the fingerprint.
    """
    path = Path(source)
    is_adapter, is_job = (path / "adapter_config.json").is_file(), (path / ".qwlora").is_dir()
    if encodings is None and (keep_float or block_order):
        raise SourceError("--keep-float and --block-order need --encodings; add it, or remove them")
    if encodings is not None and (is_adapter or is_job):
        raise SourceError(
            "--encodings needs a float model; SOURCE is an adapter or a job's directory. Give the "
            "float model's folder"
        )
    if is_adapter and against is not None:
        raise SourceError(
            f"--against compares two models, but {source} is an adapter; remove --against"
        )
    model: Inspection | None = None
    if not is_adapter and (not is_job or (path / "base").is_dir()):
        from qwlora.analysis.inspect_model import inspect_source

        model = inspect_source(
            str(path / "base") if is_job else source,
            against,
            encodings=encodings,
            keep_float=keep_float or (),
            block_order=block_order,
        )
    lines = [] if model is None else list(_model_lines(model))
    record: dict[str, Any] = {} if model is None else model.to_json()
    if is_adapter:
        record, lines = _adapter(path, None)
    elif is_job:
        folders = sorted(p.parent for p in path.glob("adapters/*/adapter_config.json"))
        adapters = [_adapter(folder, model.fingerprint if model else None) for folder in folders]
        patterns = ("simulation/*", "export/*/*", "results.json")
        files = sorted(str(p.relative_to(path)) for glob in patterns for p in path.glob(glob))
        lines = [f"job directory {source}", *(lines or ["no base yet"])]
        lines += [line for _, described in adapters for line in described]
        lines += [f"contains {file}" for file in files]
        record = {"kind": "job directory", "source": source, "base": record or None}
        record |= {"adapters": [content for content, _ in adapters], "artifacts": files}
    print_result(record, lines, as_json)


def _adapter(folder: Path, base: str | None) -> tuple[dict[str, Any], list[str]]:
    """An adapter as JSON and in lines, compared with the fingerprint of the base next to it."""
    from qwlora.adapter.adapter_check import adapter_report
    from qwlora.adapter.adapter_folder import check_files

    report = adapter_report(folder, folder.parent)
    check_files(folder)
    lines = [
        f"adapter {folder}",
        f"{report.kind} of rank {report.rank}, alpha {report.alpha}, on {report.modules} layers, "
        f"{report.parameters:,} weights",
        f"trained on the base with fingerprint {report.base}"
        if report.base
        else "does not record which base it was trained on",
    ]
    if None not in (base, report.base) and base != report.base:
        lines.append("  this is NOT the base in this directory")
    return {"source": str(folder), **asdict(report)}, lines


def _model_lines(inspection: Inspection) -> Iterator[str]:
    from qwlora.analysis.inspect_model import bits_per_weight, size_bytes, weights

    yield f"{inspection.kind} {inspection.source}"
    if inspection.fingerprint:
        yield f"fingerprint {inspection.fingerprint}"
    measured = any(view.sqnr_db is not None for view in inspection.tensors)
    rows = [("tensor", "count", "shape", "grid", "bits/weight", *(["SQNR dB"] if measured else []))]
    for name, views in group_similar(
        inspection.tensors, lambda view: view.name, lambda view: (view.shape, view.grid, view.bytes)
    ):
        shape, bits = "x".join(map(str, views[0].shape)), f"{views[0].bits_per_weight:.2f}"
        row = (name, str(len(views)), shape, views[0].grid, bits)
        rows.append((*row, _range(views)) if measured else row)
    yield from table(rows)
    integers = [view for view in inspection.tensors if view.is_integers]
    for label, views in (("all", list(inspection.tensors)), ("integers", integers)):
        if views:
            yield (
                f"{label}: {weights(views):,} weights, {size(size_bytes(views))}, "
                f"{bits_per_weight(views):.3f} bits per weight"
            )


def _range(views: Sequence[TensorView]) -> str:
    """Least and largest SQNR."""
    values = sorted(view.sqnr_db for view in views if view.sqnr_db is not None)
    ends = ["exact" if math.isinf(value) and value > 0 else f"{value:.2f}" for value in values]
    return "" if not ends else ends[0] if values[0] == values[-1] else f"{ends[0]} to {ends[-1]}"
