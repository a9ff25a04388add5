"""Imports go one way: cli -> pipeline -> recipe -> steps -> grid -> errors. Steps do not import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "qwlora"
STEPS = ("adapter", "base", "data", "evaluate", "export", "report", "simulation")
RANK = {
    "errors": 0,
    "gradients": 0,
    "hub": 0,
    "memory": 0,
    "progress": 0,
    "sizes": 0,
    "grid": 1,
    "encodings": 2,
    **dict.fromkeys(STEPS, 3),
    "recipe": 4,
    "starter": 5,
    "pipeline": 5,
    "cli": 6,
    "cli_adapters": 6,
    "cli_encodings": 6,
    "cli_inspect": 6,
    "cli_merge": 6,
    "cli_progress": 6,
    "cli_simulate": 6,
    "cli_table": 6,
    "__main__": 7,
}


def room(module: str) -> str:
    """The folder or file directly below the package: `qwlora.grid.scheme` -> `grid`."""
    return [*module.split("."), ""][1]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                [node.module]
                if node.module != "qwlora"
                else [f"qwlora.{a.name}" for a in node.names]
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def wrong_imports(package: Path) -> list[str]:
    wrong = []
    for path in sorted(package.rglob("*.py")):
        here = path.relative_to(package).with_suffix("").parts[0]
        if here == "__init__":
            continue
        for module in imports(path):
            there = room(module)
            if module.split(".")[0] != "qwlora" or there in ("", here):
                continue
            if RANK[there] > RANK[here] or (RANK[there] == RANK[here] and there in STEPS):
                wrong.append(f"{path.relative_to(package)} imports {module}")
    return wrong


def test_imports_go_one_way() -> None:
    assert wrong_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("grid/planted.py", "from qwlora.base.packed import PackedLinear"),
        ("simulation/planted.py", "import qwlora.export.verify"),
        ("base/planted.py", "from qwlora.adapter import train"),
        ("export/planted.py", "from qwlora import pipeline"),
        ("errors.py", "from qwlora.grid import scheme"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(line + "\n")
    assert len(wrong_imports(tmp_path)) == 1


def test_names_that_are_loaded_later_are_listed() -> None:
    import qwlora

    assert {*qwlora.__all__, "__version__"} <= set(dir(qwlora))


def test_every_module_has_a_place() -> None:
    assert {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in PACKAGE.rglob("*.py")} - {
        "__init__"
    } <= RANK.keys()
