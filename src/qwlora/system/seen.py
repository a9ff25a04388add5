"""SHA-256 digests of files as they were last seen, cached in `.qwlora/seen.json`, so that unchanged
files are not read again.

    {"files": {"/a/file": [size, mtime_ns, ctime_ns, inode, "digest"]}, "sha256": "of the rest"}

The cache may be deleted at any time; a damaged one is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

from qwlora.system import strict_json
from qwlora.system.atomic import write_text
from qwlora.system.regular_files import is_special

# Files written less than this ago are not cached: a second write within the same tick of the file
# system's clock (up to 2 s) would leave the stamps unchanged.
SETTLED_NS = 2 * 10**9


class Seen:
    """Digests of files, cached in memory; `save` writes them to the JSON file `cache`."""

    def __init__(self, cache: Path | None = None):
        self.cache, self._is_changed = cache, False
        files: Any = ((unsealed(cache) if cache else None) or {}).get("files")
        self._known = dict[str, tuple[tuple[int, ...], str]]()
        # A stranger's job may have any JSON here, with a checksum that agrees.
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            for path, (*stamps, digest) in files.items():
                self._known[path] = (tuple(stamps), str(digest))

    def content(self, path: str | Path) -> str | None:
        """SHA-256 of a file's content, as hex digits; None if it cannot be read."""
        path = os.path.abspath(path)
        # The record of a stranger's job may list a pipe, whose content never ends.
        if is_special(Path(path)):
            return None
        try:
            with open(path, "rb") as file:
                before = _stamps(file)
                if path in self._known and self._known[path][0] == before:
                    return self._known[path][1]
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                is_settled = time.time_ns() - before[2] > SETTLED_NS
                if is_settled and _stamps(file) == before:
                    self._known[path], self._is_changed = (before, digest), True
                return digest
        except OSError:
            return None

    def save(self) -> None:
        """Write the cache if it changed; does nothing if its folder is missing or read-only."""
        if self.cache is None or not self._is_changed:
            return
        kept = {p: [*s, d] for p, (s, d) in sorted(self._known.items()) if os.path.exists(p)}
        with contextlib.suppress(OSError):
            write_text(self.cache, sealed({"files": kept}))
            self._is_changed = False


def sealed(content: dict[str, Any]) -> str:
    """JSON text of `content` with a checksum, which shows damage."""
    return strict_json.dumps({**content, "sha256": _checksum(content)}, indent=1) + "\n"


def unsealed(file: Path) -> dict[str, Any] | None:
    """The content of a file that `sealed` made; None if it is missing or damaged."""
    if is_special(file):
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
        return content if content.pop("sha256") == _checksum(content) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _checksum(content: Any) -> str:
    # A number as a key, or a tuple, is something else after it was written and read.
    as_read = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _stamps(file: BinaryIO) -> tuple[int, ...]:
    # The ctime detects a file that was rewritten in place and had its mtime restored: the kernel
    # sets it at every write, and programs cannot choose its value.
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
