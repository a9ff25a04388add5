"""Run a notebook and store it with its outputs, without what is printed on standard error and
without names of temporary folders.

    python docs/run_notebook.py examples/first_adapter.ipynb [OTHER.ipynb]

Needs `pip install 'qwlora[notebooks]'`. `metadata.ran` is a digest of the code that made the
outputs; a test compares.
"""

from __future__ import annotations

import hashlib
import re
import sys
from typing import Any


def code_digest(notebook: dict[str, Any]) -> str:
    """SHA-256 of the code cells of a notebook's JSON."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\n".join("".join(c["source"]) for c in cells).encode()).hexdigest()


def main(path: str, written: str) -> None:
    """Run the notebook `path` and store it in `written`."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
    nbformat.write(stored(notebook), written)


def stored(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook that ran, as it is stored."""
    for cell in notebook["cells"]:
        cell["metadata"] = {}  # times
        for output in list(cell.get("outputs", ())):
            if output.get("name") == "stderr":
                cell["outputs"].remove(output)
            elif "text" in output:
                text = "".join(output["text"])
                output["text"] = re.sub(r"/[^ ']*/tmp\w+/", "/tmp/folder/", text)
    notebook["metadata"]["ran"] = code_digest(notebook)
    return notebook


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[-1])
