"""What a command prints: results on standard output, everything else on standard error.

Text of files, of models and of answers may contain control characters, with which it could clear a
terminal, rename its window or write to its clipboard. Within `safe_streams` both streams show them
as escapes (`\x1b`); only `console` writes real ones, for colors and bars.

With --json, standard output is JSON alone: only `print_json` writes to it. What libraries print
there, such as a banner when they are imported, goes to standard error.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from qwlora.errors import escaped
from qwlora.system import strict_json

T = TypeVar("T")


class _Escaping:
    """A text stream that writes control characters as escapes."""

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
    """Writes its own control sequences, and those of the text that it shows as escapes."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text))


def console(stderr: bool = False, width: int | None = None) -> Console:
    """A console on standard output, or on standard error.

    Args:
        width: columns if the stream is not a terminal.
    """
    stream: Any = sys.stderr if stderr else sys.stdout
    file = stream.stream if isinstance(stream, _Escaping) else stream
    columns = None if stream.isatty() else width
    return _EscapingConsole(file=file, width=columns, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def safe_streams(arguments: Sequence[str]) -> Iterator[None]:
    """Standard streams for one command, whose `arguments` may contain --json."""
    before = sys.stdin, sys.stdout, sys.stderr
    for stream in before[1:]:
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding than UTF-8
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # as in arguments; `prompt_ids` refuses them
        sys.stdin.reconfigure(errors="surrogateescape")
    sys.stderr = _Escaping(before[2])
    with contextlib.ExitStack() as stack:
        if "--json" in arguments:
            stack.enter_context(_only_json(before[1]))
        else:
            sys.stdout = _Escaping(before[1])
        try:
            yield
        finally:
            sys.stdin, sys.stdout, sys.stderr = before


_for_json: TextIO | None = None


@contextlib.contextmanager
def _only_json(stream: TextIO) -> Iterator[None]:
    """Let only `print_json` write to `stream`; other output, also of C code, goes to standard
    error."""
    global _for_json
    sys.stdout = sys.stderr
    if stream is not sys.__stdout__:  # a test captures it
        _for_json = stream
        try:
            yield
        finally:
            _for_json = None
        return
    stream.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as _for_json:
        os.dup2(2, 1)
        try:
            yield
        finally:
            _for_json.flush()
            os.dup2(_for_json.fileno(), 1)
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


def group_similar(
    items: Sequence[T], name_of: Callable[[T], str], kind_of: Callable[[T], Hashable]
) -> list[tuple[str, list[T]]]:
    """Group items of equal kind whose names differ only in numbers.

    Returns (name of the group, items) pairs, in order of each group's first item. Numbers in the
    name are replaced by `*`; where several groups would get the same name, it lists the numbers.
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
    models: dict[str, dict[str, Any]] = {}
    for stage, content in tasks.items():
        if stage in ("float", "base"):
            models[stage] = content
        else:
            models |= {f"{stage}/{adapter}": scores for adapter, scores in content.items()}
    rows = [
        (task, metric, model, score["value"], score["stderr"])
        for model, scores in models.items()
        for task, measured in scores.items()
        for metric, score in measured["metrics"].items()
    ]
    texts = [
        (*names, f"{value:.4f}", "" if error is None else f"{error:.4f}")
        for *names, value, error in sorted(rows, key=lambda row: row[:2])
    ]
    yield from table([("task", "metric", "model", "value", "± stderr"), *texts])


def _numbers(names: Iterable[str]) -> str:
    """The first number of each name, ranges shortened: 0-3,7."""
    numbers = sorted({int(found.group()) for name in names if (found := re.search(r"\d+", name))})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
