"""What a command prints: results on standard output, everything else on standard error.

Progress is shown on standard error: bars on a terminal, else a line at most every 30 seconds.

    2/9 quantize            ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━
    quantizing              ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  10/30  0:01:12 left

The first row is the job's stage, for commands that run one; the others are the steps that run now.
They are erased when the command ends. Text that is printed meanwhile appears above them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, TextIO, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.segment import Segment
from rich.table import Column

from qwlora.errors import duration, escaped
from qwlora.system import strict_json

T = TypeVar("T")
LAST_LOSSES = 8  # whose mean is shown: single ones jump
REFRESHES = 4  # per second
LINE_SECONDS = 30.0  # between lines of progress without a terminal


# Text of files, models and answers may contain control characters, with which it could clear a
# terminal, rename its window or write to its clipboard. Both streams show them as escapes (`\x1b`);
# only a `console` writes real ones, for colors and bars.
class _Escaping:
    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(escaped(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _EscapingConsole(Console):
    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text))


def console(stderr: bool = False, width: int | None = None) -> Console:
    """A console on a standard stream, of `width` columns if that is not a terminal."""
    stream: Any = sys.stderr if stderr else sys.stdout
    file = stream.stream if isinstance(stream, _Escaping) else stream
    columns = None if stream.isatty() else width
    return _EscapingConsole(file=file, width=columns, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def safe_streams(arguments: Sequence[str]) -> Iterator[None]:
    """Standard streams for one command, whose `arguments` may contain --json."""
    before = sys.stdin, sys.stdout, sys.stderr
    # Input that is not UTF-8 becomes surrogates, as in arguments: `prompt_ids` refuses both.
    # Output may go to a terminal that is not UTF-8, which is no reason to fail.
    for stream, errors in zip(before, ("surrogateescape", *["backslashreplace"] * 2), strict=True):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    sys.stderr = _Escaping(before[2])
    sys.stdout = sys.stderr if "--json" in arguments else _Escaping(before[1])
    try:
        with _only_json(before[1]) if "--json" in arguments else contextlib.nullcontext():
            yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


_for_json: TextIO | None = None


@contextlib.contextmanager
def _only_json(stream: TextIO) -> Iterator[None]:
    """Let only `print_json` write to `stream`."""
    global _for_json
    with contextlib.ExitStack() as stack:
        _for_json = stream
        # Libraries in C print banners and notices to descriptor 1, which becomes standard error.
        # A stream that a test captures is another one.
        if stream is sys.__stdout__:
            stream.flush()
            _for_json = stack.enter_context(os.fdopen(os.dup(1), "w", encoding="utf-8"))
            stack.callback(os.dup2, _for_json.fileno(), 1)
            os.dup2(2, 1)
        try:
            yield
        finally:
            _for_json = None


def print_json(value: Any) -> None:
    """Print `value` on standard output; with --json nothing else is printed there."""
    print(strict_json.dumps(value, indent=1), file=_for_json, flush=True)


def print_result(value: Any, lines: Iterable[str], as_json: bool) -> None:
    """Print `value` as JSON, or else the lines that say the same."""
    if as_json:
        print_json(value)
    else:
        print("\n".join(lines))


class ProgressDisplay:
    """Shows the steps of one command, unless it is `quiet`; a context manager around it."""

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
            refresh_per_second=REFRESHES,
        )
        self._stage: tuple[TaskID, str] | None = None
        self._shown = 0.0  # when figures of training were shown last
        self._ended = threading.Event()
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> ProgressDisplay:
        # Standard output is for results, but runtimes such as GPTQModel print there.
        self._exit.enter_context(contextlib.redirect_stdout(sys.stderr))
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

    def show_training(self, progress: Callable[[], dict[str, Any]]) -> None:
        """Show the loss and the speed of training in its row."""
        # Asked for only as often as it is seen: `progress` goes through all steps so far.
        if self._quiet or time.monotonic() - self._shown < 1 / REFRESHES:
            return
        self._shown, now = time.monotonic(), progress()
        losses, rate = now["losses"][-LAST_LOSSES:], now["tokens_per_second"]
        figures = f"loss {sum(losses) / len(losses):.3f}, {rate:,.0f} tokens/s"
        steps = [
            task for task in self._progress.tasks if not self._stage or task.id != self._stage[0]
        ]
        if steps:
            self._progress.update(steps[-1].id, description=f"  {now['adapter']}: {figures}")

    def say(self, line: str) -> None:
        """Print a line on standard error, above the bars."""
        if self._quiet:
            return
        if line.startswith(("caution: ", "warning: ")) and self._progress.console.is_terminal:
            self._progress.console.print(line, style="yellow", soft_wrap=True)
        else:
            print(escaped(line), file=sys.stderr, flush=True)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """A `Track`."""
        step = self._progress.add_task(f"  {description}", total=total, count="", left="")
        began = time.monotonic()
        # A step shorter than the time between refreshes would not be seen.
        self._progress.refresh()
        try:
            for done, item in enumerate(items, 1):
                yield item
                count, left = str(done), ""
                if total:
                    seconds = (time.monotonic() - began) * (total - done) / done
                    count, left = f"{done}/{total}", f"{duration(seconds)} left"
                self._progress.update(step, completed=done, count=count, left=left)
            self._progress.refresh()
        finally:
            self._progress.remove_task(step)

    def _print_lines(self) -> None:
        while not self._ended.wait(LINE_SECONDS):
            parts = [] if self._stage is None else [self._stage[1]]
            if not (tasks := self._progress.tasks):
                continue
            last = tasks[-1]
            how_long = last.fields["left"] or f"{duration(last.elapsed or 0)} so far"
            step = f"{last.description.strip()} {last.fields['count']}".strip()
            parts.append(f"{step}, {how_long}" if tasks[len(parts) :] else how_long)
            self.say(": ".join(parts))


def group_similar(
    items: Sequence[T], name_of: Callable[[T], str], kind_of: Callable[[T], Hashable]
) -> list[tuple[str, list[T]]]:
    """Group items of equal kind whose names differ only in numbers: (name of the group, items).

    In the name, `*` replaces the numbers. It lists them where several groups would have the same.
    """
    groups: dict[tuple[str, Hashable], list[T]] = {}
    for item in items:
        groups.setdefault((re.sub(r"\d+", "*", name_of(item)), kind_of(item)), []).append(item)
    which: dict[str, set[str]] = {}
    for (pattern, _), group in groups.items():
        which.setdefault(pattern, set()).add(_numbers(map(name_of, group)))
    named = []
    for (pattern, _), group in groups.items():
        names = list(dict.fromkeys(map(name_of, group)))
        numbered = f"{pattern} ({_numbers(names)})" if len(which[pattern]) > 1 else pattern
        named.append((names[0] if len(names) == 1 else numbered, group))
    return named


def table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def score_lines(tasks: dict[str, Any]) -> Iterator[str]:
    """Scores of tasks, as `tasks` in results.json: a line for each task, metric and model."""

    def four_decimals(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    models: dict[str, dict[str, Any]] = {}
    for stage, content in tasks.items():
        is_one = stage in ("float", "base")
        models |= {stage: content} if is_one else {f"{stage}/{a}": c for a, c in content.items()}
    rows = [
        (task, metric, model, *map(four_decimals, (score["value"], score["stderr"])))
        for model, scores in models.items()
        for task, measured in scores.items()
        for metric, score in measured["metrics"].items()
    ]
    rows.sort(key=lambda row: row[:2])
    yield from table([("task", "metric", "model", "value", "± stderr"), *rows])


def _numbers(names: Iterable[str]) -> str:
    """The first number of each name, ranges shortened: 0-3,7."""
    numbers = sorted({int(match[0]) for name in names if (match := re.search(r"\d+", name))})
    # In a run of consecutive numbers, all differ from their index by the same.
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ends)
