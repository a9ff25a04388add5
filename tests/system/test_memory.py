"""What malloc keeps is given back when it is asked."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from qwlora.system.machine import peak_rss_bytes, reset_peak_rss, return_freed_memory

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="resident memory is read from /proc"
)


def resident_bytes() -> int:
    match = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def test_holes_between_blocks_are_given_back() -> None:
    blocks = [torch.ones(2**14) for _ in range(1600)]  # 64 KiB each, 105 MB
    kept = blocks[::20]
    del blocks
    before = resident_bytes()
    assert return_freed_memory()
    assert resident_bytes() < before - 70e6
    assert all(float(block.sum()) == 2**14 for block in kept)


def test_the_peak_is_counted_anew() -> None:
    reset_peak_rss()
    before = peak_rss_bytes()
    with mmap.mmap(-1, 2**26) as block:
        for _ in range(64):
            block.write(bytes(2**20))
    assert before + 60e6 < peak_rss_bytes() < before + 90e6
    reset_peak_rss()
    assert peak_rss_bytes() < before + 30e6
