"""The notebooks and the script in examples/ run from top to bottom; notebooks are stored with the
outputs of their code."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from docs.snippets import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
names = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def check_outputs(path: Path) -> None:
    """Every cell ran in order, without an error, and one draws a plot."""
    ran = cells(path, "code")
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    outputs = [output for cell in ran for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert kinds == {"stream", "execute_result", "display_data"}
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert any("image/png" in output.get("data", {}) for output in outputs)


@names
def test_a_notebook_is_stored_with_the_outputs_of_its_code(path: Path) -> None:
    """Run `docs/run_notebook.py NOTEBOOK` after a change."""
    notebook = json.loads(path.read_text())
    code_digest = runpy.run_path(str(ROOT / "docs/run_notebook.py"))["code_digest"]
    assert notebook["metadata"]["ran"] == code_digest(notebook)
    check_outputs(path)
    assert path.stat().st_size < 60_000


def run(folder: Path, *arguments: Any) -> str:
    """What Python prints that imports this package. A notebook's kernel is the `python` of PATH."""
    variables = {"PYTHONPATH": str(ROOT / "src"), "PATH": str(Path(sys.executable).parent)}
    found = {n: os.pathsep.join([first, os.environ.get(n, "")]) for n, first in variables.items()}
    settings: Any = {"env": os.environ | found, "cwd": folder, "text": True}
    command = [sys.executable, *arguments]
    ended = subprocess.run(command, capture_output=True, check=False, **settings)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return str(ended.stdout)


@pytest.mark.slow
@names
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    for package in ("nbformat", "nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package, reason="pip install 'qwlora[notebooks]'")
    # a process of its own, since nbclient has an event loop
    run(tmp_path, ROOT / "docs/run_notebook.py", path, tmp_path / "ran.ipynb")
    check_outputs(tmp_path / "ran.ipynb")


@pytest.mark.slow
def test_two_styles_are_switched(tmp_path: Path) -> None:
    printed = run(tmp_path, ROOT / "examples/two_styles.py", tmp_path, "--steps", "2")
    assert "onnx: equal on return: True" in printed
    assert "FAIL" not in [line.split()[1] for line in printed.splitlines() if "onnx: " in line]
    stripes, rings = ((tmp_path / f"{n}-onnx.png").read_bytes() for n in ("stripes", "rings"))
    assert stripes.startswith(b"\x89PNG")
    assert stripes != rings
