"""Commands that are killed, or that find the disk full: nothing is half-written, and the next run ends
the same, bit for bit."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .record import Record
from .targets import Target
from .victims import Running, killed_at_change, seeds, start

pytestmark = pytest.mark.attack
KILLS = {"quantize": 5, "train": 5, "merge": 5}  # the other commands, which take longer: 3


def test_killed_stages_resume_to_the_same_artifacts(
    targets: list[Target], seed: int, record: Record, tmp_path: Path
) -> None:
    trials = [(t, number) for t in targets for number in range(KILLS.get(t.arguments[0], 3))]

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

    assert len(trials) >= 50
    record.attack("kills", trials, kill, tmp_path)


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


SIZES = 2  # of free space for each command; the first is none
PAGE = 4096


def test_full_disks_are_one_message_and_nothing_half_written(
    targets: list[Target], seed: int, record: Record, tmp_path: Path
) -> None:
    with _disk(tmp_path / "probe", 2**20):
        pass  # skips where mounting is not allowed
    trials = [(target, number) for target in targets for number in range(SIZES)]

    def fill(trial: tuple[Target, int], folder: Path) -> list[tuple[str, str, str]]:
        target, number = trial
        generator = seeds(seed, "disk", target.name, str(number))
        needed = max(_size(target.after) - _size(target.before), 2 * PAGE)
        free = int(needed * generator.random()) if number else 0
        while True:
            with _disk(folder / "disk", 64 * 2**20) as disk:
                target.put(disk)
                _leave_free(disk, free)
                ended = start(target.action(disk), folder / "logs").wait()
                if ended.code == 0 and free:  # there was enough
                    free //= 2
                    continue
                problems = [ended.refused()] if ended.refused() else []
                if not problems and "space" not in ended.err:
                    problems.append(f"does not speak of space: {ended.err.strip()[-300:]}")
                problems += target.visible_damage(disk)
                (disk / "ballast").unlink(missing_ok=True)
                again = start(target.action(disk), folder / "logs").wait()
                problems += target.unequal(disk, again)
            how = f"seed {seed}, number {number}: {free} bytes free, {needed} needed"
            return [(target.name, "; ".join(problems), how)]

    record.attack("disks", trials, fill, tmp_path)


def _size(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)


@contextmanager
def _disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _leave_free(disk: Path, free: int) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file:
        remaining = shutil.disk_usage(disk).free - -(-free // PAGE) * PAGE
        while remaining > 0:
            remaining -= file.write(b"\0" * min(remaining, 2**20))
