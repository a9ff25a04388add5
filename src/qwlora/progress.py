"""How long steps report that they are under way.

A step that loops takes a `Track`: a function that hands the items through and may draw a bar meanwhile. Steps default to `untracked`; the command line
passes a `rich` bar with the time left (see `cli_progress.py`), so no step knows about terminals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@runtime_checkable
class Track(Protocol):
    """`for item in track(items, "what is going on", total): ...`"""

    def __call__(
        self, items: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]: ...


def untracked(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Hand the items through in silence."""
    yield from items
