"""`qwlora encodings`: show and convert AIMET encodings files. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from qwlora.cli.shared_arguments import AsJson
from qwlora.cli.terminal import print_json, table
from qwlora.formats import aimet_encodings
from qwlora.formats.aimet_encodings.documents import printable
from qwlora.formats.aimet_encodings.encodings_file import to_text

app = typer.Typer(
    name="encodings",
    help="Show and convert AIMET encodings files. Versions: 0.6.1, 1.0.0, 2.0.0, 2.1.0.",
    no_args_is_help=True,
)

File = Annotated[Path, typer.Argument(help="An encodings file.")]


@app.command()
def show(file: File, as_json: AsJson = False) -> None:
    """List the encodings in a valid file, or every problem of an invalid one.

    JSON has the same fields for every version.
    """
    content = aimet_encodings.read_encodings(file)
    if as_json:
        print_json(_plain(content))
        return
    producer = " ".join((content.producer or {}).values())
    print(
        f"version {content.version}{f', by {printable(producer)}' if producer else ''}, "
        f"{len(content.encodings)} encodings"
    )
    rows = [
        ("name", "section", "type", "granularity", "scale", "offset"),
        *(_row(e, content) for e in content.encodings),
    ]
    print("\n".join(table(rows)))


@app.command()
def convert(
    file: File,
    version: Annotated[str, typer.Option("--to", metavar="VERSION", help="Version to write.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write. Default: standard output.")
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Drop what the target version cannot store.")
    ] = False,
) -> None:
    """Convert between 0.6.1 and 1.0.0, or 2.0.0 and 2.1.0.

    If that would lose information, nothing is written and the losses are listed.
    """
    source = aimet_encodings.read_encodings(file)
    converted = aimet_encodings.convert(source, version, lossy)
    if out is None:
        print(to_text(converted), end="")
    else:
        aimet_encodings.write_encodings(converted, out)
        print(f"wrote {out}, version {version}, {len(converted.encodings)} encodings")


def _row(encoding: aimet_encodings.Entry, file: aimet_encodings.EncodingsFile) -> tuple[str, ...]:
    section, kind, offset = "-", f"int{encoding.bitwidth}", "-"
    if file.parameters is not None:
        section = "parameter" if encoding.name in file.parameters else "activation"
    granularity = encoding.granularity
    granularity += f" axis {encoding.axis}" if encoding.axis is not None else ""
    granularity += f" of {encoding.block_size}" if encoding.block_size is not None else ""
    match encoding:
        case aimet_encodings.LpbqEncoding():
            scale: Any = encoding.channel_scale
        case aimet_encodings.FloatEncoding():
            kind, scale = encoding.format or f"float{encoding.bitwidth}", encoding.scale
        case aimet_encodings.IntegerEncoding():
            kind = f"{'u' if encoding.signed is False else ''}{kind}"
            kind += " symmetric" if encoding.symmetric else ""
            scale, offset = encoding.scale, _extent(encoding.offset)
    shown = "-" if scale is None else _extent(scale)
    return printable(encoding.name), section, kind, granularity, shown, offset


def _extent(array: Any) -> str:
    low, high = (
        f"{end:.6g}" if array.dtype.kind == "f" else str(end) for end in (array.min(), array.max())
    )
    return low if low == high else f"{low} .. {high}"


def _plain(file: aimet_encodings.EncodingsFile) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        value = sorted(value) if isinstance(value, frozenset) else value
        return value.tolist() if isinstance(value, np.ndarray) else value

    record = asdict(file, dict_factory=lambda items: {key: plain(value) for key, value in items})
    # `asdict` takes fields only, and the granularity follows from them.
    record["encodings"] = [
        {"granularity": encoding.granularity, **fields}
        for encoding, fields in zip(file.encodings, record["encodings"], strict=True)
    ]
    return record
