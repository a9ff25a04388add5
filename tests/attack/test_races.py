"""Two processes at once: one of them works, the other says so, and nothing of the first is lost."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from .jobs import CACHE, Job, artifacts, differences, digests, fresh, write_recipe
from .record import Record
from .victims import Ended, command, qwlora, seeds, start

pytestmark = pytest.mark.attack
CHANGE = ("--set", "base.weights=w3-signed32")
NEW, THERE = "two runs on a new directory", "two runs on a directory that is there"
MERGE = "two merges into one folder"
STARTS = {NEW: 25, THERE: 25, MERGE: 10}  # of two processes


@pytest.mark.parametrize("row", STARTS)
def test_one_of_two_processes_works_and_keeps_its_files(
    row: str, qwa: Job, one_layer: Path, corpus: Path, seed: int, record: Record, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "race.yaml", one_layer, corpus, base={"solver": "rtn"})
    before, reference = tmp_path / "before", tmp_path / "reference"
    before.mkdir()
    if row == THERE:
        assert qwlora("quantize", recipe, "--out", before / "out").code == 0
    shutil.copytree(before, reference)

    def arguments(place: Path) -> tuple[str | Path, ...]:
        if row == MERGE:
            into = ("--into", "requantized", "--out", place / "out")
            return ("merge", qwa.finished, "first", *into)
        return ("quantize", recipe, "--out", place / "out", *CHANGE)

    assert qwlora(*arguments(reference)).code == 0

    def race(number: int, folder: Path) -> list[tuple[str, str, str]]:
        place = fresh(before, folder / "place")
        delay = seeds(seed, "race", row, str(number)).choice([0.0, 0.001, 0.005, 0.02, 0.1, 0.3])
        first = start(command(*arguments(place)), folder / "logs")
        time.sleep(delay)
        second = start(command(*arguments(place)), folder / "logs")
        both = (first.wait(), second.wait())
        problems = [
            f"exit code {e.code}: {e.err.strip()[-300:]}"
            for e in both
            if e.code not in (0, 2) or e.has_traceback
        ]
        if (done := sum(_has_won(ended, row) for ended in both)) != 1:
            problems.append(f"{done} winners: {[(e.code, e.err.strip()[-150:]) for e in both]}")
        if problem := differences(_content(place, row), _content(reference, row)):
            problems.append(f"lost, changed or left behind: {problem}")
        return [(row, "; ".join(problems), f"seed {seed}, number {number}: {delay} s apart")]

    record.attack("races", range(STARTS[row]), race, tmp_path / "races")


def _has_won(ended: Ended, row: str) -> bool:
    return ended.code == 0 if row == MERGE else "quantize: done" in ended.err


def _content(place: Path, row: str) -> Any:
    """The merged model; of a job, its artifacts and the names of its files."""
    if row == MERGE:
        return digests(place)
    json.loads((place / "out" / "results.json").read_text())  # it is whole
    names = {*digests(place / "out")} - {CACHE}
    return {"artifacts": artifacts(place / "out"), "files": sorted(names)}
