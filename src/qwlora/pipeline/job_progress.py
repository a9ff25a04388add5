"""How far a run is, and the time left for all of it.

left = r S + max(E - t, b)      b alone, if most of the stage was that step and half is done

S   sum of the estimates of the stages that have not begun
r   seconds / estimate of the finished stages, and of the current one once it is over its
    estimate. 30 s of a run that kept to its estimate are added to both, so that short stages
    do not decide; within 1/4 and 4
E   estimate of the current stage times r, t its seconds so far
b   time left of its current step, from the items that are done
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from qwlora.progress import OneCall, Track, call_share, seconds_left

T = TypeVar("T")
_PRIOR_SECONDS = 30.0
_MOST_OFF = 4.0


@dataclass
class _Step:
    total: int
    began: float
    done: int = 0


class JobProgress:
    """Progress of the stages of one run.

    Args:
        expected: estimated seconds of each stage that will run, in order.
        track: shows single steps.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        expected: Mapping[str, float],
        track: Track,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.expected, self._track, self._clock = dict(expected), track, clock
        self.stage: str | None = None
        self._finished: dict[str, float] = {}
        self._began = clock()
        self._step: _Step | None = None

    def begin(self, stage: str) -> None:
        """A stage begins."""
        self.stage, self._began, self._step = stage, self._clock(), None

    def end(self) -> None:
        """The current stage is finished."""
        if self.stage is not None:
            self._finished[self.stage] = self._clock() - self._began
        self.stage, self._step = None, None

    @property
    def number(self) -> int:
        """Number of the current stage, counted from 1."""
        return min(len(self._finished) + (self.stage is not None), max(1, len(self.expected)))

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """A `Track` that also counts for the time left of the job."""
        if isinstance(items, OneCall) or not total:
            yield from self._track(items, description, total)
            return
        outer, self._step = self._step, (step := _Step(total, self._clock()))
        try:
            for item in self._track(items, description, total):
                yield item
                step.done += 1
        finally:
            self._step = outer

    @property
    def seconds_left(self) -> float:
        """Estimated seconds until the last stage ends."""
        now = self._clock()
        waiting = sum(
            seconds
            for stage, seconds in self.expected.items()
            if stage not in self._finished and stage != self.stage
        )
        ratio = self._ratio(now)
        if self.stage is None:
            return ratio * waiting
        elapsed, own = now - self._began, ratio * self.expected.get(self.stage, 0.0)
        left = (1 - call_share(elapsed, own)) * own if elapsed < own else 0.1 * elapsed
        if (step := self._step) is not None and step.done:
            share, took = step.done / step.total, now - step.began
            measured = seconds_left(took, share) or 0.0
            decides = share >= 0.5 and took >= 0.5 * elapsed
            left = measured if decides else max(left, measured)
        return ratio * waiting + left

    @property
    def share(self) -> float:
        """Estimated share of the run's time that is over, from 0 to 1."""
        done = sum(self._finished.values())
        if self.stage is not None:
            done += self._clock() - self._began
        whole = done + self.seconds_left
        return done / whole if whole > 0 else 0.0

    def _ratio(self, now: float) -> float:
        took = expected = _PRIOR_SECONDS
        for stage, seconds in self._finished.items():
            took += seconds
            expected += self.expected.get(stage, seconds)
        if self.stage is not None:
            elapsed, own = now - self._began, self.expected.get(self.stage, 0.0)
            if elapsed > own:
                took, expected = took + elapsed, expected + own
        return min(max(took / expected, 1 / _MOST_OFF), _MOST_OFF)
