"""Processes that are killed: nothing half-written, and the next run ends the same, bit for bit."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from .record import Record
from .targets import Target
from .victims import Running, killed_at_change, seeds, start

pytestmark = pytest.mark.attack


# how often each kind of command is killed; those that capture a graph take longest
KILLS = {"quantize": 4, "train": 4, "merge": 4}
OTHERS = 3


def test_killed_stages_resume_to_the_same_artifacts(
    targets: list[Target], seed: int, record: Record, tmp_path: Path
) -> None:
    trials = [
        (target, number)
        for target in targets
        for number in range(KILLS.get(target.arguments[0], OTHERS))
    ]

    def kill(trial: tuple[Target, int], folder: Path) -> list[tuple[str, str, str]]:
        target, number = trial
        generator = seeds(seed, "kill", target.name, str(number))
        for attempt in range(6):
            place = folder / "trial"
            shutil.rmtree(place, ignore_errors=True)
            target.put(place)
            if number % 2:
                moment = 1 + int(generator.random() * target.changes * 0.5**attempt)
                how = f"before change {moment} of {target.changes}"
                action = killed_at_change(target.action(place), place, moment)
                ended = start(action, folder / "logs").wait()
            else:
                share = generator.random() * 0.5**attempt
                how = f"after {share:.2f} of {target.seconds:.1f} s"
                running = start(target.action(place), folder / "logs")
                _kill_at(running, share * target.seconds)
                ended = running.wait()
            if ended.code == -9:
                break
        else:
            return [(target.name, f"never killed: {ended}", how)]
        problems = target.visible_damage(place)
        again = start(target.action(place), folder / "logs").wait()
        problems += target.unequal(place, again)
        return [(target.name, "; ".join(problems), f"seed {seed}, number {number}: {how}")]

    record.attack("kills", trials, kill, tmp_path)
    assert record.tried("kills") >= 50


def _kill_at(running: Running, seconds: float) -> None:
    """Kill a process so long after it began with its stage, if it is not done by then."""
    deadline = None
    while deadline is None or time.monotonic() < deadline:
        if running.is_done():
            return
        if deadline is None and running.stage_began():
            deadline = time.monotonic() + seconds
        time.sleep(0.003)
    running.kill()
