"""Progress bars for functions that take a `Track`. Drawn on standard error, erased when done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qwlora.progress import Track, untracked

T = TypeVar("T")


def bars(quiet: bool = False) -> Track:
    """A `Track` that shows a bar and the time left; nothing if `quiet` or without a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        return untracked

    def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            yield from progress.track(items, total=total, description=description)

    return track
