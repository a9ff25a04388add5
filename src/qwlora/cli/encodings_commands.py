"""`qwlora encodings`: show, validate, convert and compare encodings files. Imports neither torch nor, until a model is given, onnx.

Exit codes: 0 done, equal or valid; 1 files differ, or an error was found in one; 2 something is wrong with what was given.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from qwlora import encodings, strict_json
from qwlora.encodings.encodings_file import to_text
from qwlora.encodings.json_fields import shown
from qwlora.encodings.validate import lines, summary

app = typer.Typer(
    name="encodings",
    help="Show, validate, convert and compare AIMET encodings files.",
    no_args_is_help=True,
)

File = Annotated[
    Path,
    typer.Argument(
        help="An encodings file, version 0.6.1, 1.0.0, 2.0.0 or 2.1.0.", show_default=False
    ),
]
Model = Annotated[
    Path | None, typer.Option("--onnx", help="The model the file belongs to.", show_default=False)
]


@app.command()
def show(
    file: File,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every field as JSON, alike for all versions.")
    ] = False,
) -> None:
    """List a file's encodings, one a line."""
    content = encodings.read(file)
    if as_json:
        print(strict_json.dumps(_plain(content), indent=1))
        return
    producer = " ".join((content.producer or {}).values())
    print(
        f"version {content.version}{f', by {shown(producer)}' if producer else ''}, {len(content.encodings)} encodings"
    )
    rows = [
        ("name", "section", "type", "granularity", "scale", "offset"),
        *(_row(e, content) for e in content.encodings),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


@app.command()
def validate(file: File, onnx: Model = None) -> None:
    """List everything that is wrong with a file, beside its model if that is given; exit 1 when there is an error."""
    findings = encodings.validate(file, onnx)
    for line in lines(findings):
        print(line)
    print(f"{file}: {summary(findings)}")
    if any(finding.severity == "error" for finding in findings):
        raise SystemExit(1)


@app.command()
def convert(
    file: File,
    version: Annotated[
        str,
        typer.Option(
            "--to", metavar="VERSION", help="0.6.1, 1.0.0, 2.0.0 or 2.1.0.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Where to write it; by default it is printed.", show_default=False
        ),
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Drop what that version cannot hold.")
    ] = False,
    onnx: Model = None,
    decompressed_bitwidth: Annotated[
        int | None,
        typer.Option(
            min=1, max=32, help="Of LPBQ encodings in 2.x, which do not say it.", show_default=False
        ),
    ] = None,
    block_order: Annotated[
        encodings.BlockOrder | None,
        typer.Option(
            help="Of block scales in 1.0.0, which does not say it: as the tensor lies, or by channel.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a file in another version; refused, with the list, when something would be lost."""
    graph = encodings.read_graph(onnx) if onnx is not None else None
    converted = encodings.convert(
        encodings.read(file),
        version,
        lossy,
        graph=graph,
        decompressed_bitwidth=decompressed_bitwidth,
        block_order=block_order,
    )
    if out is None:
        print(to_text(converted), end="")
    else:
        encodings.write(converted, out)
        print(f"wrote {out}, version {version}, {len(converted.encodings)} encodings")


@app.command()
def diff(
    first: File,
    second: File,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Relative difference of scales that is none.")
    ] = 0.0,
) -> None:
    """List what differs between two files, of any versions; exit 1 when something does."""
    if tolerance != tolerance:
        raise typer.BadParameter("the tolerance is not a number")
    differences = encodings.diff(encodings.read(first), encodings.read(second), tolerance)
    for difference in differences:
        print(difference)
    print(
        "no differences"
        if not differences
        else "1 difference"
        if len(differences) == 1
        else f"{len(differences)} differences"
    )
    if differences:
        raise SystemExit(1)


def _row(encoding: encodings.Encoding, file: encodings.EncodingsFile) -> tuple[str, ...]:
    section = (
        "-"
        if file.parameters is None
        else "parameter"
        if encoding.name in file.parameters
        else "activation"
    )
    granularity = encoding.granularity + (
        f" axis {encoding.axis}" if encoding.axis is not None else ""
    )
    granularity += f" of {encoding.block_size}" if encoding.block_size is not None else ""
    scale = (
        encoding.channel_scale if isinstance(encoding, encodings.LpbqEncoding) else encoding.scale
    )
    kind, offset = f"int{encoding.bitwidth}", "-"
    if isinstance(encoding, encodings.FloatEncoding):
        kind = encoding.format or f"float{encoding.bitwidth}"
    elif isinstance(encoding, encodings.IntegerEncoding):
        kind = f"{'' if encoding.signed in (None, True) else 'u'}int{encoding.bitwidth}{' symmetric' if encoding.symmetric else ''}"
        offset = _extent(encoding.offset)
    return (
        shown(encoding.name),
        section,
        kind,
        granularity,
        "-" if scale is None else _extent(scale),
        offset,
    )


def _extent(array: Any) -> str:
    low, high = (
        f"{end:.6g}" if array.dtype.kind == "f" else str(end) for end in (array.min(), array.max())
    )
    return low if low == high else f"{low} .. {high}"


def _plain(file: encodings.EncodingsFile) -> dict[str, Any]:
    def value(item: Any) -> Any:
        return (
            item.tolist()
            if hasattr(item, "tolist")
            else sorted(item)
            if isinstance(item, frozenset)
            else item
        )

    record = {f.name: value(getattr(file, f.name)) for f in fields(file) if f.name != "encodings"}
    entries = [
        {"granularity": e.granularity, **{f.name: value(getattr(e, f.name)) for f in fields(e)}}
        for e in file.encodings
    ]
    return record | {"encodings": entries}
