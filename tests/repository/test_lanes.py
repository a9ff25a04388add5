"""No test is in no lane: `make test` runs what is not marked, a session of noxfile.py each mark."""

import ast
import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import conftest
import qwlora

ROOT = Path(__file__).parents[2]
OPTIONS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
MARKS = [line.split(":")[0] for line in OPTIONS["markers"]]


def has_tests(path: Path) -> bool:
    body = ast.parse(path.read_text()).body
    body += [inner for node in body if isinstance(node, ast.ClassDef) for inner in node.body]
    return any(isinstance(n, ast.FunctionDef) and n.name.startswith("test_") for n in body)


def test_every_file_with_tests_is_collected() -> None:
    (place,) = OPTIONS["testpaths"]
    paths = [path for path in (ROOT / place).rglob("*.py") if has_tests(path)]
    assert len(paths) > 100
    assert not [path for path in paths if not re.fullmatch(r"test_\w+\.py", path.name)]


def test_make_test_leaves_out_the_marks_and_nothing_else() -> None:
    words = re.search(r"-m '([^']*)'", OPTIONS["addopts"])
    assert words is not None
    assert words[1].split(" and ") == [f"not {mark}" for mark in MARKS]


@pytest.mark.parametrize("mark", MARKS)
def test_a_session_of_nox_runs_each_mark(mark: str) -> None:
    assert f'"-m", "{mark}' in (ROOT / "noxfile.py").read_text()


@pytest.mark.parametrize(("mark", "outcome"), [("client", "failed"), ("slow", "skipped")])
def test_a_skip_is_a_failure_where_all_programs_are(mark: str, outcome: str) -> None:
    item: Any = SimpleNamespace(get_closest_marker=lambda name: name == mark)
    hook = conftest.pytest_runtest_makereport(item)
    next(hook)
    report = SimpleNamespace(skipped=True, outcome="skipped", longrepr="")
    with pytest.raises(StopIteration):
        hook.send(report)
    assert report.outcome == outcome


def test_benchmarks_and_examples_import_what_exists() -> None:
    """The lanes that run them are slow."""
    files = (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*"))
    called = {name for file in files for name in re.findall(r"\bqwlora\.(\w+_?)\(", code(file))}
    assert called <= set(qwlora.__all__)
    lacking = [
        f"{file.name}: {node.module}.{alias.name}"
        for file in files
        for node in ast.walk(ast.parse(code(file)))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("qwlora")
        for alias in node.names
        if not exists(str(node.module), alias.name)
    ]
    assert lacking == []


def code(file: Path) -> str:
    """The Python in a script or a notebook."""
    if file.suffix != ".ipynb":
        return file.read_text() if file.suffix == ".py" else ""
    cells = json.loads(file.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def exists(module: str, name: str) -> bool:
    """Whether a module has an attribute or a submodule of this name."""
    if hasattr(importlib.import_module(module), name):
        return True
    return importlib.util.find_spec(f"{module}.{name}") is not None
