"""AIMET encodings files, versions 0.6.1, 1.0.0, 2.0.0 and 2.1.0. numpy, no torch.

    read_encodings(path)             strict; an error lists every problem
    write_encodings(file, path)      atomic
    convert(file, version)           lossless, or an error that lists what would be lost

`docs/encodings.md` shows the four versions next to each other. `grids.py`,
which needs torch, turns grids into entries and back.
"""

from __future__ import annotations

from qwlora.formats.aimet_encodings.convert import convert
from qwlora.formats.aimet_encodings.encodings_file import read_encodings, write_encodings
from qwlora.formats.aimet_encodings.model import (
    FLOAT_FORMATS,
    VERSIONS,
    BlockOrder,
    EncodingsFile,
    Entry,
    FloatEncoding,
    IntegerEncoding,
    LpbqEncoding,
)

__all__ = [
    "FLOAT_FORMATS",
    "VERSIONS",
    "BlockOrder",
    "EncodingsFile",
    "Entry",
    "FloatEncoding",
    "IntegerEncoding",
    "LpbqEncoding",
    "convert",
    "read_encodings",
    "write_encodings",
]
