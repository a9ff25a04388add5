"""What is installed: the oldest releases by `make test-oldest`, the tested ones by the lock; and a
release is of one version, built by commands that exist."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import qwlora

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins() -> dict[str, Version]:
    lines = (ROOT / "tests/repository/oldest.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {name: Version(version) for name, version in pairs}


def test_the_oldest_allowed_releases_are_pinned() -> None:
    tested = [name for name in EXTRAS if name not in ("benchmarks", "dev", "notebooks")]
    needed = [*PROJECT["dependencies"], *(line for name in tested for line in EXTRAS[name])]
    for requirement in map(Requirement, needed):
        if requirement.name != "qwlora":
            (lowest,) = (p.version for p in requirement.specifier if p.operator in (">=", "=="))
            assert pins()[requirement.name] == Version(lowest), requirement
    for requirement in map(Requirement, EXTRAS["dev"]):
        pin = pins().get(requirement.name)
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
