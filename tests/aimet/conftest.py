"""Collects all comparisons; `--table FILE` writes them as docs/log/aimet-oracle.md."""

import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from .table import Comparison, Table

HEAD = """# Grid and simulation against aimet-torch

Written by `make test-aimet` (tests/aimet, option `--table`); do not edit.
aimet-torch {aimet}, torch {torch}, Python {python}, CPU.

An ulp is the distance between two adjacent float32 numbers. "Differ" counts numbers that are not
equal bit for bit. Offsets have AIMET's sign for unsigned codes; for AIMET's signed quantizers,
`qmin` is added.

"Values that differ" are fake-quantized values. AIMET's values depend on the mode. If gradients are
enabled, it divides by the scale, as we and ONNX Runtime do. Under `torch.no_grad()`, per tensor and
per channel, it calls `torch.fake_quantize_*`, which multiplies by the reciprocal: now and then a
value on the border between two codes gets the other one. The last column counts these differences
between AIMET's two modes.

Rows named "simulation" compare a whole `QuantizationSimModel` with ours, with equal placements:
encodings of weights and activations after the same calibration batches, then every quantized value
and the logits of another batch. A code that differs under `no_grad` changes all values computed
from it.
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
    parser.addoption("--checkpoints", type=Path, help="the folder that write_checkpoints.py wrote")
    parser.addoption(
        "--guide", type=Path, help="the folder that write_guide.py wrote, for test_guide.py"
    )
    parser.addoption(
        "--forms", type=Path, help="the folder that write_forms.py wrote, for test_forms.py"
    )
    parser.addoption("--forms-table", type=Path, help="write the table of the forms into this file")


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
    """One row of the table; the test sets its name."""
    row = Comparison()
    yield row
    table.rows.append(row)
