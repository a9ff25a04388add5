"""A program of target `executorch` in ExecuTorch's own runtime for Python.

Runs in a process of its own (`Isolated`): of 60 programs with one damaged word, several ended the
process. GenAI, llama.cpp, OpenVINO and MLX run in the caller's: none of their files, damaged in the
same ways, ended it (docs/log/reliability.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qwlora.errors import ExportError, foreign_as

MODEL, ADAPTER, NO_ADAPTER = "model.pte", "adapter.safetensors", "none.safetensors"


class Program:
    """The program of a base, with adapters and caches. Caches stay here: for a long text, they are
    larger than all else that is sent.

    Args:
        file: of the program.
    """

    def __init__(self, file: Path):
        from executorch.runtime import Runtime

        self._none = file.with_name(NO_ADAPTER)
        self._factors = {self._none: _factors(self._none)}
        with foreign_as(ExportError, f"ExecuTorch cannot load {str(file)!r}"):
            self._program = Runtime.get().load_program(file)
            self._forward = self._program.load_method("forward")
            about = self._forward.metadata
            count = about.num_inputs() - len(self._factors[self._none])
            sizes = [about.input_tensor_meta(number).sizes() for number in range(count)]
            self._tokens, self._past = sizes[0][1], sizes[3][2]
            empty = [torch.zeros(1, heads, 0, width) for _, heads, _, width in sizes[3:]]
        self._caches, self._made = {0: empty}, 0

    def extend(
        self, tensors: dict[str, Tensor], past: int, adapter: str | None, dropped: list[int]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Logits of new tokens, and the number of the cache with them.

        Args:
            tensors: `ids` [1, tokens].
            past: number of a cache; 0: none.
            adapter: folder of the adapter; None: the base alone.
            dropped: numbers of caches that are no longer needed.
        """
        file = self._none if adapter is None else Path(adapter, ADAPTER)
        factors = self._factors[file] = self._factors.get(file) or _factors(file)
        cache, parts = self._caches[past], list[Tensor]()
        for part in tensors["ids"].split(self._tokens, dim=1):
            length, new = cache[0].shape[2], part.shape[1]
            if length > self._past:
                raise ExportError(f"the program holds {self._past} past tokens; use a shorter text")
            mask, positions = torch.ones(1, length + new), torch.arange(length, length + new)
            inputs = [part.contiguous(), mask.long(), positions[None], *cache, *factors]
            with foreign_as(ExportError, "ExecuTorch cannot run the program"):
                outputs = self._forward.execute(inputs)
            logits, *cache = (output.clone() for output in outputs)  # the next call overwrites them
            parts.append(logits)
        for number in dropped:
            del self._caches[number]
        self._made += 1
        self._caches[self._made] = cache
        return {"cache": self._made}, {"logits": torch.cat(parts, 1)}


def _factors(file: Path) -> list[Tensor]:
    """The tensors of an adapter, as inputs."""
    tensors = load_file(file)
    return [tensors[name] for name in sorted(tensors)]
