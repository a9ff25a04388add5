"""What is found to have changed, and what is not read again."""

import hashlib
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from qwlora.system import seen as module
from qwlora.system.seen import Seen

SETTLED_NS = module.SETTLED_NS


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as old enough to be cached as soon as they are written."""
    monkeypatch.setattr(module, "SETTLED_NS", -(10**18))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(b"old")
    return tmp_path / "a"


@pytest.fixture
def cache(file: Path) -> Path:
    """The cache after the file was read."""
    (seen := Seen(file.with_name("cache.json"))).content(file)
    seen.save()
    return file.with_name("cache.json")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_only_a_file_that_is_old_enough_is_not_read_again(file, cache, monkeypatch) -> None:
    """A second write could fall into the same tick of the clock, and leave the same stamps."""
    monkeypatch.setattr(hashlib, "file_digest", read := Mock())
    assert Seen(cache).content(file) == sha256(b"old")
    monkeypatch.setattr(module, "SETTLED_NS", SETTLED_NS)
    seen = Seen()
    assert seen.content(file) is seen.content(file)
    assert read.call_count == 2


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_new_content_with_old_size_and_mtime_is_found(file: Path, cache: Path, how: str) -> None:
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    written = file if how == "in place" else file.with_name("b")
    with written.open("r+b" if how == "in place" else "wb") as opened:
        opened.write(b"new")
    os.utime(written, ns=times)
    written.replace(file)
    assert Seen(cache).content(file) == sha256(b"new")


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"files": 1, "sha256": 2}', b"\xff", None])
def test_a_damaged_cache_is_ignored(file: Path, cache: Path, damage: bytes | None) -> None:
    edited = cache.read_bytes().replace(sha256(b"old").encode(), sha256(b"lie").encode())
    cache.write_bytes(edited if damage is None else damage)
    assert Seen(cache).content(file) == sha256(b"old")


def test_without_a_job_there_is_no_cache(file: Path) -> None:
    for place in (None, file.parent / "none" / "cache.json"):
        seen = Seen(place)
        seen.content(file)
        seen.save()
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("path", ["/dev/zero", "link", "pipe", "none", "folder"])
def test_what_is_no_file_has_no_digest(path: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    assert Seen().content(tmp_path / path) is None
    assert Seen(tmp_path / path).content(__file__)  # its cache
