"""How long-running steps report progress: they take a `Track`, which yields the items and may draw
a bar (`cli/terminal.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@runtime_checkable
class Track(Protocol):
    """Progress display of a loop: `for item in track(items, "calibrating", total): ...`"""

    def __call__(
        self, items: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]: ...


def untracked(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items without reporting anything."""
    yield from items


@contextmanager
def one_step(track: Track, description: str) -> Iterator[None]:
    """Report the block as a step that cannot count what it has done, such as a capture."""
    items = track([None], description)
    next(items, None)
    try:
        yield
    finally:
        # A generator ends its step only when it is asked for more.
        for _ in items:
            pass
