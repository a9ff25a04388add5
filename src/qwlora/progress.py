"""How long-running steps report progress.

Such a step takes a `Track`, a function that yields the items and may draw a progress bar.
The default `untracked` draws nothing; the command line passes a `rich` bar
(`cli/progress_bars.py`), so no step depends on a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@runtime_checkable
class Track(Protocol):
    """`for item in track(items, "calibrating", total): ...`"""

    def __call__(
        self, items: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]: ...


def untracked(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items without reporting anything."""
    yield from items
