"""A newcomer in a fresh environment does what first-five-minutes.md and README.md say, literally.

The commands of the page run in a copy of the repository, with a new virtual environment. What they
print is compared with what the page shows: words must be the same, numbers may differ by a little.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from docs.snippets import ROOT, blocks

PAGE = ROOT / "docs" / "first-five-minutes.md"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
RELATIVE = 0.05  # processors differ in the last bits, and 20 steps amplify them
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git knows, as they are now."""
    place = tmp_path_factory.mktemp("newcomer") / "qwlora"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    return place


def run(command: str, clone: Path) -> str:
    """Standard output of a command; a newcomer has no PYTHONPATH and no virtual environment."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    settings: Any = {"cwd": clone, "env": environment, "text": True, "check": False}
    ended = subprocess.run(["bash", "-c", command], capture_output=True, **settings)
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout


def differences(shown: str, printed: str) -> list[str]:
    """Lines of a page that the output does not have, in their order."""
    found, place = [], 0
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for line in (" ".join(line.split()) for line in shown.splitlines()):
        hit = next((i for i in range(place, len(lines)) if is_same(line, lines[i])), None)
        if hit is None:
            found.append(line)
        else:
            place = hit + 1
    return found


def is_same(shown: str, printed: str) -> bool:
    if NUMBER.sub("N", shown) != NUMBER.sub("N", printed):
        return False
    pairs = zip(*(map(number, NUMBER.findall(text)) for text in (shown, printed)), strict=True)
    return all(abs(a - b) <= RELATIVE * max(abs(a), 1) for a, b in pairs)


def number(text: str) -> float:
    return float(text.replace(",", ""))


def without_machine(text: str) -> str:
    """The page's lines, without those whose numbers belong to the machine or to a fingerprint."""
    kept = [line for line in text.splitlines() if "fingerprint" not in line]
    return "\n".join(line for line in kept if "±" not in line)


def test_the_page_is_true(clone: Path) -> None:
    printed, ran = "", 0
    for block in blocks(PAGE):
        if block.language == "shell":
            for line in block.text.splitlines():
                printed = run(line, clone)
                ran += 1
        elif block.language == "text":
            assert differences(without_machine(block.text), printed) == []
        elif block.language == "python":
            assert len(run(f".venv/bin/python -c {shlex.quote(block.text)}", clone)) > 25
    assert ran == 6
    again = run(
        ".venv/bin/qwlora run src/qwlora/recipe/examples/first.yaml --out out/first 2>&1", clone
    )
    assert "quantize: skipped, nothing it depends on has changed" in again
    assert " ...\n" not in again
    assert (clone / "out/first/report.html").stat().st_size > 10_000


def test_the_commands_of_the_readme_work_on_a_recipe_that_was_filled_in(clone: Path) -> None:
    found = [block.text for block in blocks(clone / "README.md") if block.language == "shell"]
    (lines,) = [text for text in found if "qwlora init" in text]
    commands = [shlex.split(line, comments=True) for line in lines.splitlines()]
    init, check, data, plan, _ = (f".venv/bin/{shlex.join(words)}" for words in commands)
    assert "wrote recipe.yaml" in run(init, clone)
    recipe = clone / "recipe.yaml"
    recipe.write_text((clone / "src/qwlora/recipe/examples/first.yaml").read_text())
    assert "solver: keep" in run(check, clone)
    assert "loss tokens" in run(data, clone)
    assert "peak memory" in run(plan, clone)


@pytest.mark.parametrize("printed", ["perplexity, float 29.0", "perplexity, hf 21.7"])
def test_a_planted_difference_is_found(printed: str) -> None:
    assert differences("perplexity, float   21.666", "a line\nperplexity, float 21.7") == []
    assert differences("perplexity, float   21.666", f"a line\n{printed}") != []
