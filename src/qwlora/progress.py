"""How long-running steps report progress.

Such a step takes a `Track`, a function that yields the items and may draw a progress bar.
The default `untracked` draws nothing; the command line passes a `rich` bar
(`cli/progress_bars.py`), so no step depends on a terminal.

A step that is one call, such as a capture, cannot count what it has done. It runs within `timed`,
with an estimate of its duration:

    with timed(track, "capturing the graph", seconds):
        program = torch.export.export(...)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class OneCall(Iterable[None]):
    """The single item of a step that cannot count what it has done.

    Args:
        seconds: how long it should take.
    """

    seconds: float

    def __iter__(self) -> Iterator[None]:
        yield None


@contextmanager
def timed(track: Track, description: str, seconds: float) -> Iterator[None]:
    """Report the block as a step that takes about `seconds`."""
    items = track(OneCall(seconds), description, 1)
    next(items, None)
    try:
        yield
    finally:
        for _ in items:  # ends the step
            pass


def call_share(elapsed: float, expected: float) -> float:
    """Estimated share of a call that is done after `elapsed` seconds.

    Linear up to 90 % of the expected duration; from there it approaches 1, which it never reaches,
    so that a late call always has time left.
    """
    if expected <= 0:
        return 0.0
    ratio = elapsed / expected
    return ratio if ratio < 0.9 else 1 - 0.1 * 0.9 / ratio


def seconds_left(elapsed: float, share: float) -> float | None:
    """Time left of a step at a constant pace; None if nothing is done yet."""
    return elapsed * (1 - share) / share if share > 0 else None
