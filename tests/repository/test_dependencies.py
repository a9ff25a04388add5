"""What is installed: the oldest releases by `make test-oldest`, the tested ones by the lock; and a
release is of one version, built by commands that exist."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import qwlora

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TESTED = [name for name in EXTRAS if name not in ("benchmarks", "dev", "notebooks")]
REQUIREMENTS = [
    Requirement(line)
    for line in [*PROJECT["dependencies"], *(line for name in TESTED for line in EXTRAS[name])]
]


def pins() -> dict[str, Version]:
    lines = (ROOT / "tests/repository/oldest.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {name: Version(version) for name, version in pairs}


@pytest.mark.parametrize("requirement", [r for r in REQUIREMENTS if r.name != "qwlora"], ids=str)
def test_the_oldest_allowed_release_is_pinned(requirement: Requirement) -> None:
    (lowest,) = (p.version for p in requirement.specifier if p.operator in (">=", "=="))
    assert pins()[requirement.name] == Version(lowest)


@pytest.mark.parametrize("line", EXTRAS["dev"])
def test_pins_allow_the_tools_of_the_tests(line: str) -> None:
    requirement = Requirement(line)
    pin = pins().get(requirement.name)
    assert pin is None or pin in requirement.specifier


LOCK = (ROOT / "requirements/lock.txt").read_text()
ALL = ("data", "gguf", "hf", "onnx")
LOCKED = [*PROJECT["dependencies"], *(line for extra in ALL for line in EXTRAS[extra])]


@pytest.mark.parametrize("line", LOCKED)
def test_the_lock_pins_what_is_needed(line: str) -> None:
    assert EXTRAS["all"] == [f"qwlora[{','.join(ALL)}]"]
    requirement = Requirement(line)
    found = re.findall(rf"^{requirement.name}==([^ ]+)", LOCK, re.MULTILINE)
    assert found
    assert all(Version(version) in requirement.specifier for version in found)


def test_the_lock_has_a_hash_for_each_pin_and_names_no_index() -> None:
    pins = re.split(r"^(?=\S)", LOCK, flags=re.MULTILINE)[1:]
    assert len(pins) > 60
    assert [
        pin for pin in pins if not re.match(r"\S+==\S+ .*\n +--hash=sha256:[0-9a-f]{64}", pin)
    ] == []
    assert "://" not in LOCK
    assert "--index" not in LOCK


def test_a_release_has_one_version() -> None:
    (cited,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert PROJECT["version"] == qwlora.__version__ == cited


def test_workflows_run_what_exists_and_pin_actions() -> None:
    text = "".join(path.read_text() for path in (ROOT / ".github/workflows").iterdir())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    sessions = set(
        re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    )
    assert set(re.findall(r"run: make (\S+)", text)) == {"test", "static", "docs"} <= targets
    assert set(re.findall(r"run: nox --session (\S+)", text)) == {"package"} <= sessions
    assert re.findall(r"uses: (\S+)@(?![0-9a-f]{40}\b)", text) == []
