"""Joins a .gguf file that was cut into pieces, as package registries with a size limit require.

The pieces are concatenated once into a file in `$XDG_CACHE_HOME/qwlora/joined` (default
`~/.cache`). Its name is a hash of the pieces' paths, sizes, mtimes, ctimes and inodes, so changed
pieces are joined again. This does not join the output of llama-gguf-split, whose parts are each a
valid GGUF file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qwlora.errors import SourceError
from qwlora.system.file_stamps import file_stamps

SUFFIX = ".gguf"


def join_parts(parts: Sequence[Path]) -> Path:
    """Join `parts` in the cache and return the path of the joined file.

    Raises:
        SourceError: a part is missing, the name of the first does not contain `.gguf`, or the cache
            is not writable.
    """
    if missing := [part for part in parts if not part.is_file()]:
        raise SourceError(
            f"{str(missing[0].absolute())!r}, part {parts.index(missing[0]) + 1} of "
            f"{len(parts)} of a model, is missing; install or download all parts"
        )
    stem, found, _ = parts[0].name.partition(SUFFIX)
    if not found:
        raise SourceError(
            f"{str(parts[0])!r} is not a part of a {SUFFIX} file. Only parts of {SUFFIX} files can "
            f"be joined: NAME{SUFFIX}.part00+NAME{SUFFIX}.part01"
        )
    identity = "\0".join(
        str(each) for part in parts for each in (part.resolve(), *file_stamps(part.stat()))
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwlora" / "joined"
    target = cache / hashlib.sha256(identity.encode()).hexdigest()[:16] / f"{stem}{SUFFIX}"
    try:
        if not target.is_file():
            _write(target, parts)
    except OSError as error:
        raise SourceError(
            f"the parts of {target.name!r} cannot be joined in {str(cache)!r}: {error}; "
            "set XDG_CACHE_HOME to a folder with enough space"
        ) from error
    return target


def _write(target: Path, parts: Sequence[Path]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as whole:
        try:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole, 2**20)
            whole.flush()
            os.fsync(whole.fileno())
            os.replace(whole.name, target)
        except BaseException:
            Path(whole.name).unlink(missing_ok=True)
            raise
