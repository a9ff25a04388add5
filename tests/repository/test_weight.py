"""The size of the code stays within the budget that pyproject.toml states."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUDGET: dict[str, int] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["qwlora"]


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def lines(folder: str) -> int:
    return sum(len(path.read_text().splitlines()) for path in files(folder))


def entries(folder: str) -> int:
    """Of the folder with most of them."""
    folders = {path.parent for path in files(folder)}
    return max(sum(e.name != "__pycache__" for e in each.iterdir()) for each in folders)


FOUND = {
    "source_lines": lines("src"),
    "source_files": len(files("src")),
    "source_folder_entries": entries("src/qwlora"),
    "test_lines": lines("tests"),
}


@pytest.mark.parametrize("what", BUDGET)
def test_the_code_is_within_its_budget(what: str) -> None:
    found, most = FOUND[what], BUDGET[what]
    assert found <= most, (
        f"{what} is {found:,}, and pyproject.toml allows {most:,}. Make something smaller first; "
        "raise the budget only by what a new feature was granted"
    )
