"""The oldest releases that pyproject.toml allows are those that `make test-oldest` installs."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TESTED = [name for name in EXTRAS if name not in ("benchmarks", "dev", "docs", "notebooks")]
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
