"""Safetensors files written while their tensors are made: a shard goes to disk when it is full, so that no more than one is in memory.

    model.safetensors                                          if everything fits in one shard
    model-00001-of-00003.safetensors ... and their index       otherwise, as Hugging Face names them

Files carry other names until `finish`, and what an earlier run left under the final names is removed at the start.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from qwlora import strict_json
from qwlora.atomic import move_into_place, write_text

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 2**29


class ShardWriter:
    """Writes tensors into `folder`, at most `shard_bytes` to a file (a larger tensor has one of its own)."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = folder, shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []
        for old in [
            *folder.glob("model*.safetensors"),
            folder / INDEX,
            *folder.glob(".shard-*.part"),
        ]:
            old.unlink(missing_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, which must not change any more."""
        tensor = tensor.detach().cpu().contiguous()
        if self._waiting and self._waiting_bytes + tensor.nbytes > self.shard_bytes:
            self._write()
        self._waiting[name] = tensor
        self._waiting_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what waits, and give all files their names."""
        self._write()
        count = len(self._shards)
        names = (
            [SINGLE]
            if count == 1
            else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        )
        for i, name in enumerate(names):
            self._part(i).chmod(
                self.folder.stat().st_mode & 0o666
            )  # safetensors writes for its owner alone
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
            write_text(self.folder / INDEX, strict_json.dumps(index, indent=1) + "\n")

    def _write(self) -> None:
        save_file(self._waiting, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self.folder / f".shard-{index:05}.part"
