"""SHA-256 of files, cached in a JSON file so that files that did not change are not read again.

A cached digest counts while the file's size, mtime, ctime and inode are what they were. The ctime
is what finds a file that was rewritten in place and given its old mtime back: the kernel sets it
at every write, and no program can set it to a chosen value.

    {"sha256": "of the rest", "files": {"/a/file": [size, mtime_ns, ctime_ns, inode, "digest"]}}

The cache is only a shortcut: it may be deleted at any time, and a damaged one is ignored.
This module does not import torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qwlora import strict_json
from qwlora.atomic import write_text
from qwlora.progress import Track, untracked

# A file that was written less than this ago is not cached: a second write within the same tick of
# the file system's clock (up to 2 s) would leave the same stamps.
SETTLED_NS = 2 * 10**9
_CHUNK_BYTES = 2**22
_SHOWN_BYTES = 2**30  # hashing takes about a second from here on, so it is shown
_UNREAD = "mtime:"  # begins the identity of a file that was never read

Stamps = tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode


class Digests:
    """Digests of files. Nothing is written before `save`.

    Args:
        cache: the JSON file; None keeps digests for the life of this object only.
        trust_mtime: for models of terabytes. A cached digest counts while size and mtime are what
            they were, whatever ctime and inode; and `identity` of a file that is not in the cache
            is made of its size and mtime, without reading it.
        track: shows progress while a large file is read.
    """

    def __init__(
        self, cache: Path | None = None, *, trust_mtime: bool = False, track: Track = untracked
    ):
        self.cache, self.trust_mtime, self.track = cache, trust_mtime, track
        self._known = _read(cache) if cache else {}
        self._is_changed = False

    def content(self, path: str | Path) -> str | None:
        """SHA-256 of a file's content, as hex digits; None if there is no file to read."""
        path = os.path.abspath(path)
        try:
            if (digest := self._cached(path)) and not digest.startswith(_UNREAD):
                return digest
            with open(path, "rb") as file:
                before = _stamps(os.fstat(file.fileno()))
                digest = self._hash(file, path, before[0])
                self._keep(path, before, _stamps(os.fstat(file.fileno())), digest)
        except OSError:
            return None
        return digest

    def identity(self, path: str | Path) -> str | None:
        """What tells one content of a file from another: `content`, or with `trust_mtime` a stamp.

        A cached stamp is used without `trust_mtime` too, while all four stamps are what they were.
        """
        path = os.path.abspath(path)
        try:
            if digest := self._cached(path):
                return digest
            if not self.trust_mtime:
                return self.content(path)
            stamps = _stamps(os.stat(path))
        except OSError:
            return None
        stamp = f"{_UNREAD}{stamps[0]}:{stamps[1]}"
        self._keep(path, stamps, stamps, stamp)
        return stamp

    def save(self) -> None:
        """Write the cache, if something was added and its folder is there and can be written."""
        if self.cache is None or not self._is_changed:
            return
        kept = {p: [*s, d] for p, (s, d) in sorted(self._known.items()) if os.path.exists(p)}
        with contextlib.suppress(OSError):
            write_text(self.cache, strict_json.dumps({"sha256": _checksum(kept), "files": kept}))
            self._is_changed = False

    def _cached(self, path: str) -> str | None:
        if path not in self._known:
            return None
        stamps, digest = self._known[path]
        found, compared = _stamps(os.stat(path)), 2 if self.trust_mtime else 4
        return digest if found[:compared] == stamps[:compared] else None

    def _keep(self, path: str, before: Stamps, after: Stamps, digest: str) -> None:
        if before == after and time.time_ns() - after[2] > SETTLED_NS:
            self._known[path] = after, digest
            self._is_changed = True

    def _hash(self, file: BinaryIO, path: str, size: int) -> str:
        track = self.track if size >= _SHOWN_BYTES else untracked
        digest = hashlib.sha256()
        count = -(-size // _CHUNK_BYTES)
        for chunk in track(_chunks(file), f"reading {os.path.basename(path)}", count):
            digest.update(chunk)
        return digest.hexdigest()


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def _stamps(stat: os.stat_result) -> Stamps:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _read(cache: Path) -> dict[str, tuple[Stamps, str]]:
    try:
        content = json.loads(cache.read_bytes())
        files: dict[str, Any] = content["files"]
        if content["sha256"] != _checksum(files):
            return {}
        return {path: ((a, b, c, d), digest) for path, (a, b, c, d, digest) in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _checksum(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
