"""Disks that are full: one message, nothing half-written, and it works once there is space."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .record import Record
from .targets import Target
from .victims import seeds, start

pytestmark = pytest.mark.attack
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
