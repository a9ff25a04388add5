"""Files of the project agree: tests are in lanes, dependencies pinned, a release has one version."""

import ast
import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import conftest
import qwlora

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, OPTIONS = SETTINGS["project"], SETTINGS["tool"]["pytest"]["ini_options"]
EXTRAS = PROJECT["optional-dependencies"]
MARKS = [line.split(":")[0] for line in OPTIONS["markers"]]


def test_every_file_with_tests_is_collected() -> None:
    (place,) = OPTIONS["testpaths"]
    test = re.compile(r"^ *def test_", re.MULTILINE)
    names = [path.name for path in (ROOT / place).rglob("*.py") if test.search(path.read_text())]
    assert len(names) > 100
    assert [name for name in names if not re.fullmatch(r"test_\w+\.py", name)] == []


def test_make_test_leaves_out_the_marks_and_nothing_else() -> None:
    words = re.search(r"-m '([^']*)'", OPTIONS["addopts"])
    assert words is not None
    assert words[1].split(" and ") == [f"not {mark}" for mark in MARKS]

    sessions = (ROOT / "noxfile.py").read_text()
    assert [mark for mark in MARKS if f'"-m", "{mark}' not in sessions] == []


def test_a_skip_is_a_failure_where_all_programs_are() -> None:
    for mark, outcome in (("client", "failed"), ("slow", "skipped")):
        item: Any = SimpleNamespace(get_closest_marker=lambda name, mark=mark: name == mark)
        hook = conftest.pytest_runtest_makereport(item)
        next(hook)
        report = SimpleNamespace(skipped=True, outcome="skipped", longrepr="")
        with pytest.raises(StopIteration):
            hook.send(report)
        assert report.outcome == outcome


def test_benchmarks_and_examples_import_what_exists() -> None:
    """The lanes that run them are slow."""
    scripts = (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py"))
    files = (*scripts, *ROOT.glob("examples/*.ipynb"))
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
    if file.suffix == ".py":
        return file.read_text()
    cells = json.loads(file.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def exists(module: str, name: str) -> bool:
    """Whether a module has an attribute or a submodule of this name."""
    if hasattr(importlib.import_module(module), name):
        return True
    return importlib.util.find_spec(f"{module}.{name}") is not None


def test_the_oldest_allowed_releases_are_pinned() -> None:
    lines = (ROOT / "tests/repository/oldest.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    pins = {name: Version(version) for name, version in pairs}
    tested = [name for name in EXTRAS if name not in ("benchmarks", "dev", "notebooks")]
    needed = [*PROJECT["dependencies"], *(line for name in tested for line in EXTRAS[name])]
    for requirement in map(Requirement, needed):
        if requirement.name != "qwlora":
            (lowest,) = (p.version for p in requirement.specifier if p.operator in (">=", "=="))
            assert pins[requirement.name] == Version(lowest), requirement
    for requirement in map(Requirement, EXTRAS["dev"]):
        pin = pins.get(requirement.name)
        assert pin is None or pin in requirement.specifier, requirement


def test_the_lock_pins_what_is_needed_by_hashes_of_no_index() -> None:
    lock = (ROOT / "requirements/lock.txt").read_text()
    extras = ("data", "gguf", "hf", "onnx")
    assert EXTRAS["all"] == [f"qwlora[{','.join(extras)}]"]
    needed = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    for requirement in map(Requirement, needed):
        found = re.findall(rf"^{requirement.name}==([^ ]+)", lock, re.MULTILINE)
        assert found, requirement
        assert all(Version(version) in requirement.specifier for version in found), requirement
    pinned = re.split(r"^(?=\S)", lock, flags=re.MULTILINE)[1:]
    hashed = re.compile(r"\S+==\S+ .*\n +--hash=sha256:[0-9a-f]{64}")
    assert [pin for pin in pinned if not hashed.match(pin)] == []
    assert "://" not in lock
    assert "--index" not in lock


def test_workflows_run_what_exists_and_pin_actions() -> None:
    text = "".join(path.read_text() for path in (ROOT / ".github/workflows").iterdir())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    nox = (ROOT / "noxfile.py").read_text()
    sessions = set(re.findall(r"^def (\w+)\(session", nox, re.MULTILINE))
    assert set(re.findall(r"run: make (\S+)", text)) == {"test", "static", "docs"} <= targets
    assert set(re.findall(r"run: nox --session (\S+)", text)) == {"package"} <= sessions
    assert re.findall(r"uses: (\S+)@(?![0-9a-f]{40}\b)", text) == []


def test_a_release_has_one_version() -> None:
    (cited,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert PROJECT["version"] == qwlora.__version__ == cited
