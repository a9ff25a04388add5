"""What is found to have changed, and what is not read again."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from qwlora.system import seen as module
from qwlora.system.seen import Seen

SETTLED_NS = module.SETTLED_NS


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as old enough to be cached as soon as they are written."""
    monkeypatch.setattr(module, "SETTLED_NS", -(10**18))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read."""
    found: list[str] = []
    own = Seen._hash

    def count(self: Seen, file: Any, path: str, size: int) -> str:
        found.append(Path(path).name)
        return own(self, file, path, size)

    monkeypatch.setattr(Seen, "_hash", count)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(b"old")
    return tmp_path / "a"


def rewrite(file: Path, content: bytes) -> None:
    """In place, with the size and the mtime that it had."""
    before = file.stat()
    assert len(content) == before.st_size
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_an_unchanged_file_is_read_once(file: Path, reads: list[str]) -> None:
    cache = file.with_name("cache.json")
    seen = Seen(cache)
    assert seen.content(file) == seen.content(file) == sha256(b"old")
    seen.save()
    assert Seen(cache).content(file) == sha256(b"old")
    assert reads == ["a"]


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_new_content_with_old_size_and_mtime_is_found(file: Path, how: str) -> None:
    other, cache = (file.with_name(name) for name in ("b", "cache.json"))
    (seen := Seen(cache)).content(file)
    seen.save()
    if how == "in place":
        rewrite(file, b"new")
    else:
        other.write_bytes(b"new")
        os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
        other.replace(file)
    assert Seen(cache).content(file) == sha256(b"new")


def test_a_new_file_is_not_cached(
    file: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second write could fall into the same tick of the clock, and leave the same stamps."""
    monkeypatch.setattr(module, "SETTLED_NS", SETTLED_NS)
    seen = Seen()
    seen.content(file)
    seen.content(file)
    assert reads == ["a", "a"]


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"files": 1, "sha256": 2}', b"\xff", None])
def test_a_damaged_cache_is_ignored(file: Path, damage: bytes | None) -> None:
    cache = file.with_name("cache.json")
    (seen := Seen(cache)).content(file)
    seen.save()
    edited = cache.read_bytes().replace(sha256(b"old").encode(), sha256(b"lie").encode())
    cache.write_bytes(edited if damage is None else damage)
    assert Seen(cache).content(file) == sha256(b"old")


def test_without_a_file_there_is_no_digest_and_without_a_job_no_cache(file: Path) -> None:
    assert Seen().content(file.with_name("none")) is Seen().content(file.parent) is None
    for place in (None, file.parent / "none" / "cache.json"):
        seen = Seen(place)
        seen.content(file)
        seen.save()
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("path", ["/dev/zero", "pipe"])
def test_what_may_never_end_has_no_digest(path: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for file in (tmp_path / path, tmp_path / "link"):
        assert Seen().content(file) is None
        assert Seen(file).content(__file__)  # its cache
