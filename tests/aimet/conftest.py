"""What was compared is collected while the tests run; `--table FILE` writes it down."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from .table import Comparison, Table

HEAD = """# Grid and simulation against aimet-torch

Written by `make test-aimet` (tests/aimet, option `--table`); do not edit. aimet-torch {aimet}, torch {torch}, Python {python}, on the CPU.

An ulp is the distance between two neighbouring float32 numbers. "Differ" counts numbers that are not equal bit for bit. Offsets are in AIMET's sign for
unsigned codes; AIMET's signed quantizers are brought there by adding their `qmin`.

"Values that differ" are fake-quantized values. AIMET's own depend on the mode: where a gradient may be asked for it divides by the scale, as we and as ONNX
Runtime do; under `torch.no_grad()`, per tensor and per channel, it calls `torch.fake_quantize_*`, which multiplies by the reciprocal and so puts a value that
lies on the border between two codes into the other one now and then. The last column counts those; they are AIMET's two modes disagreeing with each other.

Rows named "simulation" compare a whole `QuantizationSimModel` with ours on equal placements: encodings of weights and activations after the same calibration
batches, then every quantized value and the logits of another batch. A code that the short cut changes is carried on by all that reads it.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--table", type=Path, help="write the table of what was compared into this file"
    )
    parser.addoption(
        "--simulations",
        type=Path,
        help="the folder that write_simulations.py wrote; without it those tests are skipped",
    )


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    collected = Table()
    yield collected
    path = request.config.getoption("--table")
    if path and not request.session.testsfailed:
        path.parent.mkdir(parents=True, exist_ok=True)
        head = HEAD.format(
            aimet=version("aimet-torch"),
            torch=version("torch").split("+")[0],
            python=platform.python_version(),
        )
        path.write_text(head + collected.to_markdown())


@pytest.fixture
def comparison(table: Table) -> Iterator[Comparison]:
    """Numbers of one row; the test names it."""
    row = Comparison()
    yield row
    table.rows.append(row)
