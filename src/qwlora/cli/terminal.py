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
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from qwlora.errors import escaped
from qwlora.system import strict_json


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
