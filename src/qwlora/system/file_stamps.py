"""Whether a file is the one that was seen before, without reading it."""

from __future__ import annotations

import os

Stamps = tuple[int, int, int, int]


def file_stamps(stat: os.stat_result) -> Stamps:
    """Size, time of the last change (ns), time of the last change of its entry (ns), and inode."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
