"""The README's links and make targets exist, and the map of the code is complete."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_folder_is_in_the_map_of_the_code() -> None:
    text = (ROOT / "docs" / "code.md").read_text()
    listed = {Path(p) for p in re.findall(r"^(src/\S*)", text, re.MULTILINE)}
    folders = {
        p.relative_to(ROOT)
        for p in (ROOT / "src" / "qwlora").iterdir()
        if p.is_dir() and p.name != "__pycache__"
    }
    assert folders == listed - {Path("src/qwlora/*.py")}


def test_every_file_that_the_map_of_the_code_names_exists() -> None:
    text = (ROOT / "docs" / "code.md").read_text()
    named = re.findall(r"`(\w+(?:/\w+)+\.py)`", text)
    assert len(named) > 12
    assert [
        n for n in named if not (ROOT / "src/qwlora" / n).exists() and not (ROOT / n).exists()
    ] == []


def test_a_walk_through_the_code_has_at_most_eight_files() -> None:
    text = (ROOT / "docs" / "code.md").read_text()
    walks = [part for part in text.split("\n## ") if "\n1. " in part]
    assert len(walks) >= 5
    files = {
        walk.partition("\n")[0]: set(re.findall(r"`(\w+/[\w/]+\.py)`", walk)) for walk in walks
    }
    assert {title: names for title, names in files.items() if len(names) > 8} == {}


def test_links_lead_somewhere() -> None:
    assert [
        target for target in re.findall(r"\]\(([^)#]+)\)", README) if not (ROOT / target).exists()
    ] == []


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([\w-]+)", README)) <= set(targets)
