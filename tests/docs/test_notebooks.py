"""The notebooks in examples/ run from top to bottom, and are stored without outputs."""

from __future__ import annotations

import json
import os
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


@pytest.mark.slow
@names
def test_a_notebook_runs_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install 'qwlora[notebooks]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install 'qwlora[notebooks]'")
    pytest.importorskip("ipykernel", reason="pip install 'qwlora[notebooks]'")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    )
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
    printed = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    assert [o for o in printed if o["output_type"] == "error"] == []
    assert len(printed) >= 3
