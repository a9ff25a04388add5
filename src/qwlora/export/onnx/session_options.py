"""The options of ONNX Runtime without which a quantized model computes something else. They are
exported with the model, and a file with other options is refused.

    SESSION_OPTIONS      do not quantize the activations of 4-bit weights to 8 bits
    EIGHT_BIT_OPTIONS    for 8-bit activations: do not replace Q/DQ pairs by integer kernels
                         (QLinearSoftmax, QLinearAdd ...), which round elsewhere. Weights are
                         unpacked to float32 in memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from qwlora import strict_json
from qwlora.atomic import write_text
from qwlora.errors import SourceError, foreign_as
from qwlora.export.proof.contents import misfits
from qwlora.messages import listed

if TYPE_CHECKING:
    from qwlora.graph.quantized_graph import QuantizedGraph

SESSION_OPTIONS = {"session.qdq_matmulnbits_accuracy_level": "1"}
EIGHT_BIT_OPTIONS = {"session.disable_quant_qdq": "1"}
OPTIONS_FILE = "session_options.json"
OPTIONS_FORM = SESSION_OPTIONS | EIGHT_BIT_OPTIONS


def write_session_options(graph: QuantizedGraph, folder: Path) -> None:
    """Write the options for `add_session_config_entry` that a session of `graph` needs."""
    from qwlora.graph.quantized_graph import Kind

    eight_bits = any(
        mark.kind is Kind.ACTIVATION and graph.encodings[mark.name].scheme.bitwidth <= 8
        for mark in graph.marks
    )
    options = SESSION_OPTIONS | (EIGHT_BIT_OPTIONS if eight_bits else {})
    write_text(folder / OPTIONS_FILE, strict_json.dumps(options, indent=1) + "\n")


def read_session_options(folder: Path) -> dict[str, str]:
    """The options in `folder`, or `SESSION_OPTIONS` if there is no such file.

    Raises:
        SourceError: the file cannot be read, or has other options than `write_session_options`
            writes.
    """
    path = folder / OPTIONS_FILE
    if not path.is_file():
        return SESSION_OPTIONS
    again = "export the model again, or copy the file again"
    with foreign_as(SourceError, f"{str(path)!r} cannot be read", again):
        options: dict[str, str] = json.loads(path.read_text())
    if problems := list(misfits(options, OPTIONS_FORM)):
        raise SourceError(f"{str(path)!r}: {listed(problems)}; {again}")
    return options
