"""What the whole job came to for each architecture is collected while the tests run; `--architectures FILE` writes it down."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest

OPTION = "--architectures"
HEAD = """# Architectures

Written by `pytest tests/simulation/test_architectures.py -m 'slow or not slow' {option} docs/log/architectures.md`; do not edit.
torch {torch}, transformers {transformers}, diffusers {diffusers}, peft {peft}, onnxruntime {onnxruntime}, Python {python}, one thread; other programs ran
beside it, so the seconds are upper ends.

Tiny random models (two layers, width 32 to 64): step 1 at `w4-block32`, LoRA of rank 4 on every linear layer, two optimizer steps, capture, calibration on
three batches, export, ONNX Runtime. No code of the package names any of them.

SQNR is that of the primary output, simulated against float activations and a float adapter on the same packed base, in dB, on the batches that set the ranges;
the simulated adapter has 8 bits, and that is what A16 is bounded by. "File" is the SQNR of that output between ONNX Runtime and the simulation, "floor" the
same between two simulations that differ only in what float32 leaves open ("equal": bit for bit), "steps" the largest difference of any layer that is fed by
the simulation, in steps of its own grid.
"""
COLUMNS = (
    "architecture, inputs, nodes, encodings, capture s, calibration s, W4A16 dB, W4A8 dB, "
    "A16 file dB, floor dB, steps, A8 file dB, floor dB, steps, export s"
)


@dataclass
class Table:
    """The rows of a run."""

    wanted: bool
    rows: dict[str, list[str]] = field(default_factory=dict)

    def to_markdown(self, order: list[str]) -> str:
        columns = COLUMNS.split(", ")
        lines = [columns, ["---"] * 2 + ["--:"] * (len(columns) - 2)]
        lines += [[name, *self.rows[name]] for name in order if name in self.rows]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, type=Path, help="write the table of architectures into this file")


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    from simulation.tiny_architectures import ALL

    path = request.config.getoption(OPTION, default=None)
    collected = Table(path is not None)
    yield collected
    if path and not request.session.testsfailed:
        names = ("torch", "transformers", "diffusers", "peft", "onnxruntime")
        head = HEAD.format(
            option=OPTION,
            python=platform.python_version(),
            **{n: version(n).split("+")[0] for n in names},
        )
        path.write_text(f"{head}\n{collected.to_markdown(list(ALL))}")
