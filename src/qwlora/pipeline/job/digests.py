"""SHA-256 digests of files, cached in a JSON file so that unchanged files are not read again.

A cached digest is valid while the file's size, mtime, ctime and inode stay the same. The ctime
detects a file that was rewritten in place and had its mtime restored: the kernel sets it at every
write, and programs cannot choose its value.

    {"files": {"/a/file": [size, mtime_ns, ctime_ns, inode, "digest"]}, "sha256": "of the rest"}

The cache may be deleted at any time; a damaged one is ignored. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import BinaryIO

from qwlora.pipeline.job.stage_records import sealed, unsealed
from qwlora.system.atomic import write_text
from qwlora.system.file_stamps import Stamps, file_stamps
from qwlora.system.progress import Track, untracked

# Files written less than this ago are not cached: a second write within the same tick of the file
# system's clock (up to 2 s) would leave the stamps unchanged.
SETTLED_NS = 2 * 10**9
_CHUNK_BYTES = 2**22
_SHOWN_BYTES = 2**30  # hashing takes a second or more from here on: show progress
_UNREAD = "mtime:"  # prefix of the identity of a file that was not read


class Digests:
    """Digests of files. Nothing is written before `save`.

    Args:
        cache: the JSON file; None caches in memory only.
        trust_mtime: for models of terabytes. A cached digest is valid while size and mtime stay the
            same, and `identity` of an uncached file is its size and mtime, without reading it.
        track: shows progress while a large file is read.
    """

    def __init__(
        self, cache: Path | None = None, *, trust_mtime: bool = False, track: Track = untracked
    ):
        self.cache, self.trust_mtime, self.track = cache, trust_mtime, track
        self._is_changed = False
        files = ((unsealed(cache) if cache else None) or {}).get("files", {})
        self._known: dict[str, tuple[Stamps, str]] = {
            path: ((a, b, c, d), digest) for path, (a, b, c, d, digest) in files.items()
        }

    def content(self, path: str | Path) -> str | None:
        """SHA-256 of a file's content, as hex digits; None if it cannot be read."""
        path = os.path.abspath(path)
        try:
            if (digest := self._cached(path)) and not digest.startswith(_UNREAD):
                return digest
            with open(path, "rb") as file:
                before = file_stamps(os.fstat(file.fileno()))
                digest = self._hash(file, path, before[0])
                if file_stamps(os.fstat(file.fileno())) == before:
                    self._keep(path, before, digest)
                return digest
        except OSError:
            return None

    def identity(self, path: str | Path) -> str | None:
        """A string that changes with the file's content: `content`, or a stamp with `trust_mtime`.

        Without `trust_mtime` a cached stamp is still used while all four stamps stay the same.
        """
        path = os.path.abspath(path)
        try:
            digest = self._cached(path)
            if digest or not self.trust_mtime:
                return digest or self.content(path)
            stamps = file_stamps(os.stat(path))
        except OSError:
            return None
        stamp = f"{_UNREAD}{stamps[0]}:{stamps[1]}"
        self._keep(path, stamps, stamp)
        return stamp

    def save(self) -> None:
        """Write the cache if it changed; does nothing if its folder is missing or read-only."""
        if self.cache is None or not self._is_changed:
            return
        kept = {p: [*s, d] for p, (s, d) in sorted(self._known.items()) if os.path.exists(p)}
        with contextlib.suppress(OSError):
            write_text(self.cache, sealed({"files": kept}))
            self._is_changed = False

    def _cached(self, path: str) -> str | None:
        if path not in self._known:
            return None
        stamps, digest = self._known[path]
        compared = 2 if self.trust_mtime else 4
        return digest if file_stamps(os.stat(path))[:compared] == stamps[:compared] else None

    def _keep(self, path: str, stamps: Stamps, digest: str) -> None:
        if time.time_ns() - stamps[2] > SETTLED_NS:
            self._known[path] = stamps, digest
            self._is_changed = True

    def _hash(self, file: BinaryIO, path: str, size: int) -> str:
        track = self.track if size >= _SHOWN_BYTES else untracked
        digest, count = hashlib.sha256(), -(-size // _CHUNK_BYTES)
        chunks = iter(lambda: file.read(_CHUNK_BYTES), b"")
        for chunk in track(chunks, f"reading {os.path.basename(path)}", count):
            digest.update(chunk)
        return digest.hexdigest()
