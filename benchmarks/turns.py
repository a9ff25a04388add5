"""Ways to do a thing, compared where others use the machine too: they take turns, and a ratio is the median of the ratios of the rounds.

A way's peak memory is that of a process of its own, forked from this one: whatever is loaded is there already, and only what the way needs is kept. Free of
our package but for the reading of the peak, so that it also runs in other environments.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from qwlora.system.memory import peak_rss_bytes, reset_peak_rss


def seconds_of_turns(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Processor seconds of this thread, for each round; one round before them warms up and does not count, nor does what is to be done `before` a way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            if before and name in before:
                before[name]()
            began = time.thread_time()
            way()
            if turn:
                seconds[name].append(time.thread_time() - began)
    return seconds


def make_row(
    tool: str, way: str, seconds: Mapping[str, list[float]], peak: Mapping[str, int]
) -> dict[str, Any]:
    """A way's seconds, its ratio to `plain`, its memory."""
    return {
        "tool": tool,
        "way": way,
        "ratio": ratio(seconds, way, "plain"),
        "seconds": [round(s, 3) for s in seconds[way]],
        **peak,
    }


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median over the rounds of one way's seconds over another's."""
    return round(
        statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True)), 3
    )


def peak_of(parts: dict[str, Any], needed: str, use: Callable[[Any], object]) -> dict[str, int]:
    """Resident bytes before and at the peak of `use(parts[needed])`, in a process that has let the other parts go."""
    sys.stdout.flush()
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as pipe:
            found: dict[str, int] = json.loads(pipe.read() or "{}")
        if os.waitpid(child, 0)[1] or not found:
            raise RuntimeError(f"the process that was to measure {needed} ended without a result")
        return found
    try:
        os.close(reading)
        part = parts[needed]
        parts.clear()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        reset_peak_rss()
        resident = peak_rss_bytes()
        use(part)
        os.write(
            writing,
            json.dumps({"resident_bytes": resident, "peak_bytes": peak_rss_bytes()}).encode(),
        )
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
