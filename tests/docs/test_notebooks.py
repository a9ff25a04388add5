"""The notebooks and the script in examples/ run from top to bottom; notebooks are stored without
outputs."""

from __future__ import annotations

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
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    found = cells(path, "code")
    assert len(found) >= 5
    assert [c["outputs"] for c in found] == [[]] * len(found)
    assert {c["execution_count"] for c in found} == {None}


@names
def test_the_code_of_a_notebook_is_python(path: Path) -> None:
    for cell in cells(path, "code"):
        compile("".join(cell["source"]), path.name, "exec")


EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


@pytest.mark.slow
@names
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    for package in ("nbformat", "nbclient", "ipykernel"):
        pytest.importorskip(package, reason="pip install 'qwlora[notebooks]'")
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(  # a process of its own, since nbclient has an event loop
        [sys.executable, "-c", EXECUTE, path, tmp_path / "ran.ipynb"],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    ran = cells(tmp_path / "ran.ipynb", "code")
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    printed = [output for cell in ran for output in cell["outputs"]]
    assert [o for o in printed if o["output_type"] == "error"] == []
    assert len(printed) >= 3


@pytest.mark.slow
def test_two_styles_are_switched(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, ROOT / "examples/two_styles.py", tmp_path, "--steps", "2"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "onnx: equal on return: True" in ended.stdout
    assert "FAIL" not in [line.split()[1] for line in ended.stdout.splitlines() if "onnx: " in line]
    assert (tmp_path / "stripes-onnx.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "rings-onnx.png").read_bytes() != (
        tmp_path / "stripes-onnx.png"
    ).read_bytes()
