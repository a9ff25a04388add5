"""Progress on standard error: bars on a terminal, else a line at most every 30 seconds.

    2/9 quantize            ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  17 %  job: about 6 min left
    quantizing              ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  10/30  0:01:12 left

The first row is the whole job's, for commands that run one; the others are the steps that run now.
They are erased when the command ends, also with an error or Ctrl-C. Text that is printed meanwhile
appears above them.
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
from qwlora.messages import duration, escaped
from qwlora.pipeline.job_progress import JobProgress
from qwlora.progress import OneCall, call_share, seconds_left

T = TypeVar("T")
LINE_SECONDS = 30.0  # without a terminal


@dataclass
class _Step:
    """One call of `track` that has not ended."""

    description: str
    total: int | None
    expected: float | None
    began: float = field(default_factory=time.monotonic)
    done: int = 0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def share(self) -> float | None:
        """None if it is not known."""
        if self.expected is not None:
            return call_share(self.elapsed, self.expected)
        return self.done / self.total if self.total else None

    @property
    def count(self) -> str:
        """`12/60`, or the percentage of a step that is one call."""
        if self.expected is not None:
            return f"{self.share or 0:.0%}"
        return f"{self.done}/{self.total}" if self.total else f"{self.done}"

    @property
    def left(self) -> str:
        """`0:01:12 left`; empty as long as it is not known."""
        if self.expected is not None and self.elapsed < 0.9 * self.expected:
            seconds: float | None = self.expected - self.elapsed
        else:
            seconds = seconds_left(self.elapsed, self.share or 0.0)
        return "" if seconds is None else f"{timedelta(seconds=round(seconds))} left"


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
        self._job: JobProgress | None = None
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

    def watch(self, job: JobProgress) -> None:
        """Show the progress of a job from now on."""
        self._job = job

    def say(self, line: str) -> None:
        """Print a line on standard error, above the bars."""
        if not self._quiet:
            print(escaped(line), file=sys.stderr, flush=True)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """A `Track`."""
        expected = items.seconds if isinstance(items, OneCall) else None
        step = _Step(description, total, expected)
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
        steps, job = list(self._steps), self._job
        table = Table.grid(padding=(0, 1), expand=False)
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=self._console.width // 2)
        table.add_column(width=max(8, min(30, self._console.width // 5)))
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True)
        if job is not None and job.stage is not None:
            table.add_row(
                Text(f"{job.number}/{len(job.expected)} {job.stage}", style="bold"),
                ProgressBar(total=1.0, completed=job.share),
                f"{job.share:.0%}",
                Text(f"about {duration(job.seconds_left)} left", style="bold"),
            )
        for step in steps:
            share = step.share
            table.add_row(
                f"  {step.description}",
                ProgressBar(total=1.0, completed=share or 0.0, pulse=share is None),
                step.count,
                step.left,
            )
        return Group(table) if table.row_count else Group()

    def _print_lines(self) -> None:
        while not self._ended.wait(LINE_SECONDS):
            if line := self._line():
                self.say(line)

    def _line(self) -> str:
        """What runs now, and the time left."""
        steps, job = list(self._steps), self._job
        parts = []
        if job is not None and job.stage is not None:
            parts.append(
                f"{job.stage} ({job.number} of {len(job.expected)}): {job.share:.0%} of the job, "
                f"about {duration(job.seconds_left)} left"
            )
        if steps:
            step = steps[-1]
            left = f", {step.left}" if step.left else ""
            parts.append(f"{step.description} {step.count}{left}")
        return "; ".join(parts)
