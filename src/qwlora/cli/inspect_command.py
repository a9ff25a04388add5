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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwlora.cli.shared_arguments import AsJson
from qwlora.cli.tables import group_similar, table
from qwlora.cli.terminal import print_result
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
    encodings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An AIMET encodings file for the float model SOURCE; shows the grids it gives.",
        ),
    ] = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="With --encodings: parameters or layers that stay float, like model.keep_float in "
            "a recipe. May be repeated.",
        ),
    ] = None,
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
    if is_adapter:
        if against is not None:
            raise SourceError(
                f"--against compares two models, but {source} is an adapter; remove --against"
            )
        record = _adapter(path)
        lines = _adapter_lines(record)
    elif is_job:
        record, lines = _job(path, against)
    else:
        from qwlora.analysis.inspect_model import inspect_source

        floats = keep_float or ()
        inspection = inspect_source(
            source, against, encodings=encodings, keep_float=floats, block_order=block_order
        )
        record, lines = inspection.to_json(), list(_model_lines(inspection))
    print_result(record, lines, as_json)


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


def _adapter(folder: Path) -> dict[str, Any]:
    from qwlora.adapter.adapter_folder import FILE, base_of, check_files
    from qwlora.formats.huggingface.safetensors_files import read_header
    from qwlora.system.strict_json import read_object

    config = read_object(folder / "adapter_config.json")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise SourceError(
            f"adapter {str(folder)!r} has no adapter_model.safetensors; save it with "
            "qwlora.save_adapter or PEFT's save_pretrained"
        )
    check_files(folder)
    tensors = [
        {"name": name, "shape": list(entry.shape), "dtype": entry.dtype}
        for name, entry in read_header(weights).items()
    ]
    keys = "peft_type r lora_alpha use_rslora use_dora target_modules base_model_name_or_path"
    return {
        "kind": "adapter",
        "source": str(folder),
        "base_fingerprint": base_of(folder) if (folder / FILE).is_file() else None,
        **{key: config.get(key) for key in keys.split()},
        "tensors": tensors,
    }


def _adapter_lines(record: dict[str, Any]) -> list[str]:
    targets = record["target_modules"]
    count = sum(math.prod(tensor["shape"]) for tensor in record["tensors"])
    layers = ", ".join(sorted(targets)) if isinstance(targets, list) else targets
    return [
        f"adapter {record['source']}",
        f"{record['peft_type']} of rank {record['r']}, alpha {record['lora_alpha']}, on {layers}",
        f"{len(record['tensors'])} tensors, {count:,} weights",
        f"trained on the base with fingerprint {record['base_fingerprint']}"
        if record["base_fingerprint"]
        else "does not record which base it was trained on",
    ]


def _job(folder: Path, against: str | None) -> tuple[dict[str, Any], list[str]]:
    base = folder / "base"
    model, lines = None, list[str]()
    if base.is_dir():
        from qwlora.analysis.inspect_model import inspect_source

        inspection = inspect_source(str(base), against)
        model, lines = inspection.to_json(), list(_model_lines(inspection))
    adapters = [
        _adapter(config.parent) for config in sorted(folder.glob("adapters/*/adapter_config.json"))
    ]
    artifacts = sorted(
        str(p.relative_to(folder))
        for pattern in ("simulation/*", "export/*/*", "results.json")
        for p in folder.glob(pattern)
    )
    record = {
        "kind": "job directory",
        "source": str(folder),
        "base": model,
        "adapters": adapters,
        "artifacts": artifacts,
    }
    shown = [f"job directory {folder}", *(lines or ["no base yet"])]
    for adapter in adapters:
        shown += _adapter_lines(adapter)
        if model and adapter["base_fingerprint"] not in (None, model["fingerprint"]):
            shown.append("  this is NOT the base in this directory")
    return record, [*shown, *(f"contains {artifact}" for artifact in artifacts)]
