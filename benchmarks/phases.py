"""Time and memory of the phases of a process. Needs no package but torch's environment's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from qwlora.system.memory import peak_rss_bytes, reset_peak_rss


class Phases:
    """`with phases("train"): ...`; figures by name are in `found`."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        reset_peak_rss()
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.found[name] = {
            "seconds": round(time.perf_counter() - wall, 2),
            "processor_seconds": round(time.process_time() - processor, 2),
            "peak_bytes": peak_rss_bytes(),
        }
