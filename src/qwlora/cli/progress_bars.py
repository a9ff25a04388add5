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
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qwlora.cli.terminal import console
from qwlora.messages import escaped

T = TypeVar("T")
LINE_SECONDS = 30.0  # without a terminal


@dataclass
class _Step:
    """One call of `track` that has not ended."""

    description: str
    total: int | None
    began: float = field(default_factory=time.monotonic)
    done: int = 0

    @property
    def count(self) -> str:
        """`12/60`; nothing for a step that cannot count."""
        return f"{self.done}/{self.total}" if self.total else str(self.done or "")

    @property
    def left(self) -> str:
        """`0:01:12 left`; empty as long as it is not known."""
        if not self.total or not self.done:
            return ""
        elapsed = time.monotonic() - self.began
        seconds = round(elapsed * (self.total - self.done) / self.done)
        return f"{timedelta(seconds=seconds)} left"


class ProgressDisplay:
    """Shows the steps of one command; a context manager around it.

    What is printed meanwhile goes to standard error, since standard output is for results, and
    runtimes such as GPTQModel print there.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._console = console(stderr=True)
        self._stage: tuple[str, int, int] | None = None
        self._steps: list[_Step] = []
        self._live: Live | None = None
        self._ended = threading.Event()
        self._stdout = redirect_stdout(sys.stderr)
        self._lines = threading.Thread(target=self._print_lines, daemon=True)

    def __enter__(self) -> ProgressDisplay:
        self._stdout.__enter__()
        if self._quiet:
            return self
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._rows,
                console=self._console,
                transient=True,
                refresh_per_second=4,
            )
            self._live.start()
        else:
            self._lines.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._live is not None:
            self._live.stop()
        elif self._lines.is_alive():
            self._lines.join()
        self._stdout.__exit__(kind, value, trace)

    def watch(self, stage: str, number: int, count: int) -> None:
        """A stage of a job begins, the `number`th of `count`."""
        self._stage = stage, number, count

    def say(self, line: str) -> None:
        """Print a line on standard error, above the bars."""
        if not self._quiet:
            print(escaped(line), file=sys.stderr, flush=True)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """A `Track`."""
        step = _Step(description, total)
        self._steps.append(step)
        self._refresh()  # so that a short step is seen as well
        try:
            for item in items:
                yield item
                step.done += 1
            self._refresh()
        finally:
            self._steps.remove(step)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def _rows(self) -> Group:
        table = Table.grid(padding=(0, 1), expand=False)
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=self._console.width // 2)
        table.add_column(width=max(8, min(30, self._console.width // 5)))
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True)
        if self._stage is not None:
            stage, number, count = self._stage
            bar = ProgressBar(total=count, completed=number - 1)
            table.add_row(Text(f"{number}/{count} {stage}", style="bold"), bar)
        for step in list(self._steps):
            bar = ProgressBar(total=step.total, completed=step.done, pulse=step.total is None)
            table.add_row(f"  {step.description}", bar, step.count, step.left)
        return Group(table) if table.row_count else Group()

    def _print_lines(self) -> None:
        while not self._ended.wait(LINE_SECONDS):
            if line := self._line():
                self.say(line)

    def _line(self) -> str:
        """What runs now, and the time left of it."""
        parts = []
        if self._stage is not None:
            stage, number, count = self._stage
            parts.append(f"{stage} ({number} of {count})")
        if steps := list(self._steps):
            step = steps[-1]
            left = f", {step.left}" if step.left else ""
            parts.append(f"{step.description} {step.count}{left}".rstrip())
        return ": ".join(parts)
