"""Two processes at once: one of them works, the other says so, and nothing of the first is lost."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from .jobs import CACHE, Job, artifacts, digests, write_recipe
from .record import Record
from .victims import Ended, command, qwlora, seeds, start

pytestmark = pytest.mark.attack
STARTS = 25  # of two processes, on a new directory, and as many on one that is there
MERGES = 10


@pytest.fixture(scope="module")
def recipe(warm: None, place: Path, one_layer: Path, corpus: Path) -> Path:
    return write_recipe(place / "race.yaml", one_layer, corpus, base={"solver": "rtn"})


@pytest.mark.parametrize("is_new", [True, False], ids=["new directory", "directory that is there"])
def test_one_of_two_processes_works_and_keeps_its_files(
    recipe: Path, is_new: bool, seed: int, record: Record, tmp_path: Path
) -> None:
    change = "base.weights=w3-signed32"
    before, reference = tmp_path / "before", tmp_path / "reference"
    if not is_new:
        assert qwlora("quantize", recipe, "--out", before).code == 0
        shutil.copytree(before, reference)
    assert qwlora("quantize", recipe, "--out", reference, "--set", change).code == 0
    row = "two runs on a new directory" if is_new else "two runs on a directory that is there"

    def race(number: int, folder: Path) -> list[tuple[str, str, str]]:
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        if not is_new:
            shutil.copytree(before, out)
        action = command("quantize", recipe, "--out", out, "--set", change)
        ended, delay = _both(action, seed, row, number, folder)
        problems = _exit_codes(ended)
        if (done := sum("quantize: done" in e.err for e in ended)) != 1:
            problems.append(f"{done} winners: {[(e.code, e.err.strip()[-150:]) for e in ended]}")
        if artifacts(out) != artifacts(reference):
            problems.append(f"lost or changed: {sorted(digests(out))}")
        elif left := ({*digests(out)} ^ {*digests(reference)}) - {CACHE}:
            problems.append(f"other files: {sorted(left)}")
        else:
            for file in (out / "results.json", *out.rglob("stage.json")):
                json.loads(file.read_text())
        return [(row, "; ".join(problems), f"seed {seed}, number {number}: {delay} s apart")]

    record.attack("races", range(STARTS), race, tmp_path / "races")


def test_one_of_two_merges_into_one_folder_writes(
    qwa: Job, seed: int, record: Record, tmp_path: Path
) -> None:
    arguments = ("merge", qwa.finished, "first", "--into", "requantized", "--out")
    assert qwlora(*arguments, tmp_path / "reference").code == 0
    row = "two merges into one folder"

    def race(number: int, folder: Path) -> list[tuple[str, str, str]]:
        place = folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        ended, delay = _both(command(*arguments, place / "out"), seed, row, number, folder)
        problems = _exit_codes(ended)
        if (wrote := sum(e.code == 0 for e in ended)) != 1:
            problems.append(f"{wrote} winners")
        if digests(place / "out") != digests(tmp_path / "reference"):
            problems.append("the merged model is not whole")
        if others := sorted(p.name for p in place.iterdir() if p.name != "out"):
            problems.append(f"left behind: {others}")
        return [(row, "; ".join(problems), f"seed {seed}, number {number}: {delay} s apart")]

    record.attack("races", range(MERGES), race, tmp_path / "races")


def _both(
    action: Any, seed: int, row: str, number: int, folder: Path
) -> tuple[tuple[Ended, Ended], float]:
    """Start two processes, the second a moment after the first."""
    delay = seeds(seed, "race", row, str(number)).choice([0.0, 0.001, 0.005, 0.02, 0.1, 0.3])
    first = start(action, folder / "logs")
    time.sleep(delay)
    second = start(action, folder / "logs")
    return (first.wait(), second.wait()), delay


def _exit_codes(ended: tuple[Ended, Ended]) -> list[str]:
    return [
        f"exit code {e.code}: {e.err.strip()[-300:]}"
        for e in ended
        if e.code not in (0, 2) or e.has_traceback
    ]
