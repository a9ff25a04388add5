"""The README's links and make targets exist, and the map of the code is complete."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MAP = (ROOT / "docs" / "code.md").read_text()


def test_every_folder_is_in_the_map_of_the_code() -> None:
    listed = {Path(p) for p in re.findall(r"^(src/\S*)", MAP, re.MULTILINE)}
    found = [p for p in (ROOT / "src" / "qwlora").iterdir() if p.is_dir()]
    folders = {p.relative_to(ROOT) for p in found if p.name != "__pycache__"}
    assert folders == listed - {Path("src/qwlora/*.py")}


def test_every_file_and_function_that_the_map_of_the_code_names_exists() -> None:
    named = re.findall(r"`(\w+(?:/\w+)+\.py)`", MAP)
    assert len(named) > 12
    places = (ROOT / "src/qwlora", ROOT)
    assert [n for n in named if not any((place / n).exists() for place in places)] == []
    steps = re.findall(r"^\d\. `([\w/]+\.py)`: `(?:\w+\.)?(\w+)`", MAP, re.MULTILINE)
    assert len(steps) > 20
    for file, name in steps:
        assert re.search(rf"\n *(def|class) {name}\b", (places[0] / file).read_text()), name


def test_a_walk_through_the_code_has_at_most_ten_files() -> None:
    walks = [part for part in MAP.split("\n## ") if "\n1. " in part]
    assert len(walks) >= 5
    for walk in walks:
        assert len(set(re.findall(r"`(\w+/[\w/]+\.py)`", walk))) <= 10, walk.partition("\n")[0]


def test_links_lead_somewhere_and_make_targets_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([\w-]+)", README)) <= set(targets)
