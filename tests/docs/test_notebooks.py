"""The notebooks and the script in examples/ run from top to bottom; notebooks are stored without
outputs."""

import json
import os
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


@names
def test_a_notebook_is_python_and_stored_without_outputs(path: Path) -> None:
    found = cells(path, "code")
    assert len(found) >= 5
    for cell in found:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        compile("".join(cell["source"]), path.name, "exec")


EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


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
    for package in ("nbformat", "nbclient", "ipykernel"):
        pytest.importorskip(package, reason="pip install 'qwlora[notebooks]'")
    # a process of its own, since nbclient has an event loop
    run(tmp_path, "-c", EXECUTE, path, tmp_path / "ran.ipynb")
    ran = cells(tmp_path / "ran.ipynb", "code")
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    printed = [output for cell in ran for output in cell["outputs"]]
    assert [o for o in printed if o["output_type"] == "error"] == []
    assert len(printed) >= 3


@pytest.mark.slow
def test_two_styles_are_switched(tmp_path: Path) -> None:
    printed = run(tmp_path, ROOT / "examples/two_styles.py", tmp_path, "--steps", "2")
    assert "onnx: equal on return: True" in printed
    assert "FAIL" not in [line.split()[1] for line in printed.splitlines() if "onnx: " in line]
    stripes, rings = ((tmp_path / f"{n}-onnx.png").read_bytes() for n in ("stripes", "rings"))
    assert stripes.startswith(b"\x89PNG")
    assert stripes != rings
