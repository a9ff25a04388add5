"""Parts of one file, joined in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwlora.formats.joined_files import join_parts


def test_a_part_rewritten_in_place_is_joined_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parts = [tmp_path / "a.gguf.part00", tmp_path / "a.gguf.part01"]
    for part in parts:
        part.write_bytes(b"old")
    os.utime(parts[1], ns=(1, 1))
    assert join_parts(parts).read_bytes() == b"oldold"
    parts[1].write_bytes(b"new")
    os.utime(parts[1], ns=(1, 1))
    assert join_parts(parts).read_bytes() == b"oldnew"
