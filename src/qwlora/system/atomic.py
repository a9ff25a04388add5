"""Files and folders that appear whole or not at all, even if the machine loses power.

The scratch copy of `NAME` is `.NAME.part`, next to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# All metadata are one JSON text under one key: safetensors 0.8 writes several keys in random order,
# so equal tensors would make different files.
_RECORD, _DIGEST = "qwlora", "sha256"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path to write a file to; when the block ends, it replaces `path`.

    If the block raises, the scratch file is deleted and `path` stays as it was.
    """
    # A name has at most 255 bytes, so a long one leaves no room for the suffix.
    scratch = path.with_name(f".{path.name[:200]}.part")
    try:
        yield scratch
        move_into_place(scratch, path)
    finally:
        # The error of the block is the one to report, not that of this cleanup.
        with contextlib.suppress(OSError, ValueError):
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_files(
    folder: Path, last: str | None = None, obsolete: Collection[str] = ()
) -> Iterator[Path]:
    """Yield a scratch folder; when the block ends, its files replace those of `folder`.

    If the block raises, or a file cannot be moved, `folder` stays as it was. If the process is
    killed while files are moved, `folder` has no `last`.

    Args:
        last: name of the file that marks the others next to it as complete. The old one is moved
            away before all other files, and the new one is put in place after them.
        obsolete: old files, relative to `folder`, that are deleted unless they are replaced.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In the folder itself, since a rename works only within one file system.
        with tempfile.TemporaryDirectory(
            prefix=".", suffix=".part", dir=folder, ignore_cleanup_errors=True
        ) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            new.mkdir()
            yield new
            flush(new)
            # `last` goes first and comes last: without it, a reader refuses the files next to it.
            files = sorted(files_in(new), key=lambda file: Path(file).name == last)
            replaced = [f for f in {*files, *obsolete} if os.path.lexists(folder / f)]
            replaced.sort(key=lambda file: Path(file).name != last)
            moves = [(folder / file, old / file) for file in replaced]
            moves += [(new / file, folder / file) for file in files]
            above = {parent for file in files for parent in (folder / file).parents}
            created += sorted((p for p in above if not p.exists()), key=str, reverse=True)
            try:
                for source, target in moves:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    source.replace(target)
            except BaseException:
                # Ctrl-C may come right after a move, so the files say which moves took place.
                for source, target in reversed(moves):
                    if os.path.lexists(target) and not os.path.lexists(source):
                        target.replace(source)
                raise
            for parent in {(folder / file).parent for file in files}:
                flush_folder(parent)
    except BaseException:
        remove_empty(created)
        raise


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of `folders` that exist and are empty, in this order."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def files_in(folder: Path) -> list[str]:
    """Sorted paths, relative to `folder`, of all files in it and below it."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def total_bytes(paths: Iterable[Path]) -> int:
    """The size of all files among `paths`; folders count nothing."""
    return sum(path.stat().st_size for path in paths if path.is_file())


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, replacing what was there. If this fails, the old file stays."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def link(source: str, target: str) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, replacing what was there; its folder is made if need be.

    Its metadata get a digest of the tensors and the metadata, which `read_tensors` checks.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    # `save_file` refuses other tensors, such as a transposed weight.
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    record = {**(metadata or {}), _DIGEST: _digest(contiguous, metadata or {})}
    with replacing(path) as scratch:
        save_file(contiguous, scratch, metadata={_RECORD: json.dumps(record, sort_keys=True)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata that `write_tensors` wrote.

    Raises:
        OSError: the file cannot be read.
        SafetensorError: it is not a safetensors file.
        ValueError: its content changed after it was written, or something else wrote it.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, "pt") as opened:
        metadata = json.loads((opened.metadata() or {}).get(_RECORD, "{}"))
    if _DIGEST not in metadata:
        raise ValueError("it has no digest of its content")
    expected, tensors = metadata.pop(_DIGEST), load_file(path)
    if expected != _digest(tensors, metadata):
        raise ValueError("its content changed after it was written")
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    import torch

    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        # numpy has no bfloat16, and torch cannot view a 0-D tensor as bytes.
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def move_into_place(scratch: Path, target: Path) -> None:
    """Flush a file or a folder to disk and rename it to `target`, on the same file system.

    A file replaces the file at `target`. A folder needs `target` to be absent or an empty folder.
    """
    # After a power cut, a file system may show a new name with no content. So the content is on
    # the disk before the rename, and the rename before this returns.
    flush(scratch)
    scratch.replace(target)
    flush_folder(target.parent)


def flush(path: Path) -> None:
    """Flush a file, or a folder with all that is in it, to disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            _flush_file(Path(folder, name))
        flush_folder(Path(folder))
    if not path.is_dir():
        _flush_file(path)


def _flush_file(path: Path) -> None:
    with path.open("rb") as file:
        # safetensors 0.8 makes its files 0600, which no other user of a shared folder can read.
        # The umask can only be read by setting it; files made meanwhile are private.
        if os.fstat(file.fileno()).st_mode & 0o777 == 0o600:
            mask = os.umask(0o077)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Flush a folder's list of names; ignored where a network file system cannot."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
