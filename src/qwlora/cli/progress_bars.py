"""Progress on standard error: bars on a terminal, else a line at most every 30 seconds.

    2/9 quantize            ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━
    quantizing              ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  10/30  0:01:12 left

The first row is the job's stage, for commands that run one; the others are the steps that run now.
The time left of a step follows from what it has done. They are erased when the command ends, also
with an error or Ctrl-C. Text that is printed meanwhile appears above them.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, redirect_stdout
from datetime import timedelta
from typing import TypeVar

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from qwlora.cli.terminal import console
from qwlora.errors import escaped

T = TypeVar("T")
LINE_SECONDS = 30.0  # without a terminal


class ProgressDisplay:
    """Shows the steps of one command; a context manager around it.

    What is printed meanwhile goes to standard error, since standard output is for results, and
    runtimes such as GPTQModel print there.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        screen = console(stderr=True)
        names = Column(no_wrap=True, overflow="ellipsis", max_width=screen.width // 2)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=names),
            BarColumn(max(8, min(30, screen.width // 5))),
            TextColumn("{task.fields[count]}", markup=False, justify="right"),
            TextColumn("{task.fields[left]}", markup=False),
            console=screen,
            transient=True,
            refresh_per_second=4,
        )
        self._stage: tuple[TaskID, str] | None = None
        self._ended = threading.Event()
        self._exit = ExitStack()

    def __enter__(self) -> ProgressDisplay:
        self._exit.enter_context(redirect_stdout(sys.stderr))
        if not self._quiet and self._progress.console.is_terminal:
            self._exit.enter_context(self._progress)
        elif not self._quiet:
            lines = threading.Thread(target=self._print_lines, daemon=True)
            lines.start()
            self._exit.callback(lines.join)
        self._exit.callback(self._ended.set)
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def watch(self, stage: str, number: int, count: int) -> None:
        """A stage of a job begins, the `number`th of `count`."""
        if self._stage is not None:
            self._progress.remove_task(self._stage[0])
        row = self._progress.add_task(
            f"{number}/{count} {stage}", total=count, completed=number - 1, count="", left=""
        )
        self._stage = row, f"{stage} ({number} of {count})"

    def say(self, line: str) -> None:
        """Print a line on standard error, above the bars."""
        if not self._quiet:
            print(escaped(line), file=sys.stderr, flush=True)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """A `Track`."""
        step = self._progress.add_task(f"  {description}", total=total, count="", left="")
        began = time.monotonic()
        self._progress.refresh()  # so that a short step is seen as well
        try:
            for done, item in enumerate(items, 1):
                yield item
                count, left = str(done), ""
                if total:
                    seconds = round((time.monotonic() - began) * (total - done) / done)
                    count, left = f"{done}/{total}", f"{timedelta(seconds=seconds)} left"
                self._progress.update(step, completed=done, count=count, left=left)
            self._progress.refresh()
        finally:
            self._progress.remove_task(step)

    def _print_lines(self) -> None:
        """Say what runs now, and the time left of it."""
        while not self._ended.wait(LINE_SECONDS):
            parts = [] if self._stage is None else [self._stage[1]]
            if steps := self._progress.tasks[len(parts) :]:
                words = [steps[-1].description.strip(), steps[-1].fields["count"]]
                line = " ".join(filter(None, words))
                parts.append(", ".join(filter(None, [line, steps[-1].fields["left"]])))
            if parts:
                self.say(": ".join(parts))
