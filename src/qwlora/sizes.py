"""Sizes of files and memory, in words."""

from __future__ import annotations


def size(count_bytes: int) -> str:
    """`12.3 MB`; below 0.1 MB `45.6 kB`. Both are decimal."""
    return f"{count_bytes / 1e6:,.1f} MB" if count_bytes >= 1e5 else f"{count_bytes / 1e3:.1f} kB"
