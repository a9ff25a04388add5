"""Imports point down only: cli, pipeline, recipe, steps, formats and graph and encodings, nn, grid, errors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "qwlora"
LEVELS = (
    {"messages", "parameter_names", "progress", "revisions"},
    {"errors"},
    {"atomic", "strict_json", "system"},
    {"grid"},
    {"nn"},
    {"encodings", "graph"},
    {"formats"},
    {"data"},
    {"adapter", "quantize"},
    {"simulation"},
    {"analysis", "export", "report"},
    {"recipe"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
)
RANK = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


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
            if RANK[there] >= RANK[here]:
                wrong.append(f"{path.relative_to(package)} imports {module}")
    return wrong


def test_imports_go_one_way() -> None:
    assert wrong_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("grid/planted.py", "from qwlora.nn import PackedLinear"),
        ("simulation/planted.py", "import qwlora.export.verify"),
        ("quantize/planted.py", "from qwlora.adapter import train"),
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
