"""Writes safetensors shards one by one, so that at most one shard is in memory.

    base.safetensors                                          if everything fits in one shard
    base-00001-of-00003.safetensors ... and an index file     otherwise, as in Hugging Face folders

Shards have temporary names until `finish` renames them. Creating a `ShardWriter` deletes the shards
of an earlier run from the folder.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from qwlora import strict_json
from qwlora.atomic import move_into_place, write_text

STEM = "base"
SINGLE, INDEX = ".safetensors", ".safetensors.index.json"  # after the stem
SHARD_BYTES = 2**29


class ShardWriter:
    """Writes tensors into `folder`, at most `shard_bytes` per file; a larger tensor gets its own
    file."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = folder, shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []
        for old in [
            *folder.glob(f"{STEM}{SINGLE}"),
            *folder.glob(f"{STEM}-*-of-*{SINGLE}"),
            folder / f"{STEM}{INDEX}",
            *folder.glob(".shard-*.part"),
        ]:
            old.unlink(missing_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor. It must not be modified afterwards."""
        tensor = tensor.detach().cpu().contiguous()
        if self._waiting and self._waiting_bytes + tensor.nbytes > self.shard_bytes:
            self._write()
        self._waiting[name] = tensor
        self._waiting_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> str:
        """Write the last shard, rename all shards, and write the index if there are several.

        Returns:
            The name of the file, or of the index.
        """
        self._write()
        count = len(self._shards)
        names = (
            [f"{STEM}{SINGLE}"]
            if count == 1
            else [f"{STEM}-{i + 1:05}-of-{count:05}{SINGLE}" for i in range(count)]
        )
        for i, name in enumerate(names):
            # safetensors creates files that only their owner can read
            self._part(i).chmod(self.folder.stat().st_mode & 0o666)
            move_into_place(self._part(i), self.folder / name)
        if count > 1:
            placed = {
                tensor: name
                for name, tensors in zip(names, self._shards, strict=True)
                for tensor in tensors
            }
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": dict(sorted(placed.items())),
            }
            write_text(self.folder / f"{STEM}{INDEX}", strict_json.dumps(index, indent=1) + "\n")
        return names[0] if count == 1 else f"{STEM}{INDEX}"

    def _write(self) -> None:
        save_file(self._waiting, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self.folder / f".shard-{index:05}.part"
