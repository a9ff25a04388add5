"""Resident memory of this process: measure its peak, and return freed memory to the system.

Linux can reset the peak; on other systems it is the peak since the process began.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import sys
from pathlib import Path


def return_freed_memory() -> bool:
    """Make glibc return its free pages to the system now; False if malloc is not glibc's.

    Takes 20 ms per 100 MB, and as long again when the pages are next used. Having malloc return
    every large block by itself (M_MMAP_THRESHOLD of 8 MiB) was slower: a checkpointed step of
    SmolLM2 spent 5 of 28 seconds in page faults.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim is not None and bool(trim(0) or True)


def reset_peak_rss() -> None:
    """Reset the peak (Linux only)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def rss_bytes() -> int:
    """Resident size in bytes now; the peak where the system does not tell it."""
    return _status_bytes("VmRSS") or peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Largest resident size in bytes since `reset_peak_rss`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status_bytes("VmHWM") or (peak if sys.platform == "darwin" else peak * 1024)


def _status_bytes(field: str) -> int:
    """A size in /proc/self/status; 0 where there is none."""
    with contextlib.suppress(OSError):
        if match := re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(match[1]) * 1024
    return 0


def memory_limit_bytes() -> int | None:
    """Memory that this process may use: the machine's, or less in a container; None if unknown."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits) if limits else None
