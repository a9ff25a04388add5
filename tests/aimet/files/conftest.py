"""What aimet-onnx loads; `--loaders-table FILE` writes it as docs/log/aimet-onnx.md."""

import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

HEAD = """# Files of target `aimet` in aimet-onnx

Written by `make test-aimet` (tests/aimet/files, option `--loaders-table`); do not edit.
aimet-onnx {aimet}, qai-hub {hub}, onnx {onnx}, Python {python}, CPU.

Target `aimet` wrote a one-layer Llama with an adapter for each grid. Weights are stored as floats on
their grids.

| column | question |
|---|---|
| AI Hub | does the client's offline check call the folder an AIMET model? |
| to_onnx_qdq | `encodings_to_onnx_qdq(model, encodings, prequantize_constants=True)`: are the integers of all parameters ours, bit for bit? |
| sim | `load_encodings_to_sim(sim, encodings, strict=False)`: does every encoding load, and does rounding all weights change no output bit? |
| strict | `load_encodings_to_sim(sim, encodings, strict=True)`, the sim's quantizers set as the entries say, and off where there is none (`configured` in test_loaders.py): does it load? |

A refusal is aimet-onnx's own, with its words. `strict=True` needs two things that no file can give.
The sim's own quantizers must have the same bits, symmetry and granularity as the entries; AIMET
also sets some on masks and inside norms, which have no entry. And in 1.0.0 there may be no entry of
a tensor that has no quantizer: AIMET has none where values are only moved (Reshape, Transpose,
Gather ...), while AI Hub wants encodings there. In 2.0.0 AIMET drops those by itself.

| grid | version | AI Hub | to_onnx_qdq | sim | strict |
|---|---|---|---|---|---|
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--loaders-table", type=Path, help="write the table into this file")
    parser.addoption("--files", type=Path, help="the folder that write_files.py wrote")


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], dict[str, str]]]:
    rows: dict[tuple[str, str], dict[str, str]] = {}
    yield rows
    path = request.config.getoption("--loaders-table")
    if path and not request.session.testsfailed:
        head = HEAD.format(
            aimet=version("aimet-onnx"),
            hub=version("qai-hub"),
            onnx=version("onnx"),
            python=platform.python_version(),
        )
        lines = [
            f"| {grid} | {v} | {row['hub']} | {row['qdq']} | {row['sim']} | {row['strict']} |\n"
            for (grid, v), row in rows.items()
        ]
        path.write_text(head + "".join(lines))
