"""What the README and the map of the code name exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MAP = (ROOT / "docs" / "code.md").read_text()


def test_every_file_and_function_that_the_map_of_the_code_names_exists() -> None:
    places = (ROOT / "src/qwlora", ROOT)
    named = re.findall(r"`(\w+(?:/\w+)+\.py)`", MAP)
    assert [n for n in named if not any((place / n).exists() for place in places)] == []
    steps = re.findall(r"^\d\. `([\w/]+\.py)`: `(?:\w+\.)?(\w+)`", MAP, re.MULTILINE)
    assert min(len(named), len(steps)) > 12
    for file, name in steps:
        assert re.search(rf"\n *(def|class) {name}\b", (places[0] / file).read_text()), name


def test_links_lead_somewhere_and_make_targets_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([\w-]+)", README)) <= set(targets)
