"""AIMET's encodings files, versions 0.6.1, 1.0.0, 2.0.0 and 2.1.0: read, write, convert, compare, validate. numpy, no torch.

    read(path) -> EncodingsFile          strict; every problem at once
    write(file, path)                    atomic
    convert(file, version)               lossless, or an error that lists what would be lost
    diff(a, b, tolerance)                across versions too
    validate(file, onnx_path)            findings, beside the model's graph if given
    schema(version)                      the version's JSON Schema

`docs/encodings.md` shows the four versions side by side.
"""

from __future__ import annotations

from qwlora.encodings.compare import Difference, diff
from qwlora.encodings.convert import BlockOrder, convert
from qwlora.encodings.encodings_file import read, write
from qwlora.encodings.json_fields import Finding
from qwlora.encodings.json_schema import schema
from qwlora.encodings.model import (
    FLOAT_FORMATS,
    VERSIONS,
    Encoding,
    EncodingsFile,
    FloatEncoding,
    IntegerEncoding,
    LpbqEncoding,
)
from qwlora.encodings.onnx_parameters import TensorFacts, read_graph
from qwlora.encodings.validate import validate

__all__ = [
    "FLOAT_FORMATS",
    "VERSIONS",
    "BlockOrder",
    "Difference",
    "Encoding",
    "EncodingsFile",
    "Finding",
    "FloatEncoding",
    "IntegerEncoding",
    "LpbqEncoding",
    "TensorFacts",
    "convert",
    "diff",
    "read",
    "read_graph",
    "schema",
    "validate",
    "write",
]
