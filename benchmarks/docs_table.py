"""Tables that a benchmark writes into a page of docs, between its marks."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def write_table(page: str, script: str, text: str) -> None:
    """Replace what is between `<!-- benchmarks/SCRIPT -->` and its end mark in docs/PAGE."""
    marks = f"<!-- benchmarks/{script} -->", f"<!-- end of benchmarks/{script} -->"
    pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
    new = f"{marks[0]}\n{text}\n{marks[1]}"
    file = DOCS / page
    written, count = re.subn(pattern, lambda _: new, file.read_text(), flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"docs/{page} has {count} pairs of marks {marks}, not one")
    file.write_text(written)
