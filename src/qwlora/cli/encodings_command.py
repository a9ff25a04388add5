"""`qwlora encodings`: show an AIMET encodings file. Imports no torch."""

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


def encodings(
    file: Annotated[Path, typer.Argument(help="An encodings file.")], as_json: AsJson = False
) -> None:
    """Check an AIMET encodings file: list its encodings, or its problems if it is invalid.

    Reads versions 0.6.1, 1.0.0, 2.0.0 and 2.1.0.
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
