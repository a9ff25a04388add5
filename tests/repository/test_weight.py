"""The size of the code stays within the budget that pyproject.toml states."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUDGET: dict[str, int] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["qwlora"]


def lines(folder: str) -> int:
    return sum(len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py"))


def test_the_code_is_within_its_budget() -> None:
    files = list((ROOT / "src").rglob("*.py"))
    folders = {path.parent for path in files}
    entries = [sum(e.name != "__pycache__" for e in folder.iterdir()) for folder in folders]
    found = {"source_lines": lines("src"), "test_lines": lines("tests")}
    found |= {"source_files": len(files), "source_folder_entries": max(entries)}
    above = {what: (found[what], most) for what, most in BUDGET.items() if found[what] > most}
    assert above == {}, "make something smaller first"
