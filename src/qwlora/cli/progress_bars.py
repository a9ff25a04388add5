"""Progress bars on the terminal, for steps that take a `Track`; they go to standard error and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qwlora.progress import Track, untracked

T = TypeVar("T")


def bars(quiet: bool = False) -> Track:
    """A bar with the time left where standard error is a terminal; silence elsewhere, and if `quiet`."""
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
