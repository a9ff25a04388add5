"""Resident memory of this process: its peak, as Linux counts it (elsewhere the peak since the process began), and giving back what was freed."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def give_back() -> bool:
    """Have glibc's malloc give the pages of holes between blocks back to the system, now, and say whether it is there.

    Takes some 20 ms for 100 MB, and as much again when the pages are used the next time. Telling malloc to give every large block back by itself
    (M_MMAP_THRESHOLD of 8 MiB) was tried: a checkpointed step of SmolLM2 then spent 5 of 28 seconds in page faults.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim is not None and bool(trim(0) or True)


def reset_peak_rss() -> None:
    """Start counting anew, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """The largest resident size since `reset_peak_rss`."""
    with contextlib.suppress(OSError):
        if match := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()):
            return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
