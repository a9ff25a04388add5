"""Resident memory of this process: its peak, as Linux counts it (elsewhere the peak since the process began), and how soon what was freed is given back."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from pathlib import Path

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_STATUS = Path("/proc/self/status")


def give_back_soon() -> bool:
    """Have glibc's malloc give blocks of 8 MiB and more back when they are freed, and say whether it is there.

    By itself it raises that limit to 32 MiB as a program goes, and keeps the holes that smaller activations leave: a checkpointed step of four layers peaked
    at 933 MB so, and at 841 MB with this, at the same time; with a limit of 1 MiB at 739 MB and 1.25 of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, 8 * 2**20))


def give_back() -> bool:
    """Have glibc's malloc give the pages of holes between blocks back to the system, now, and say whether it is there. Takes some 20 ms for 100 MB."""
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
