"""Load the blocks of a model only while they are needed, so that a solver with calibration data can
quantize a model larger than memory.

    loaded     tensors outside all blocks (embeddings, last norm, head): at the start
               a block: when the first batch arrives at it
    released   a block: written to disk when the last batch has arrived at the next block
               everything else: at the end

Peak memory: what is outside the blocks, one block as floats (two while batches move on) with its
moments and the activations of a batch, one shard, and the hidden states of the batches. Hooks on
the blocks notice arrivals; `quantize_blocks_`, which runs the batches, does not know about this
module.

A tensor that is read both inside a block and elsewhere is kept to the end. A block that runs again
after the next one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from qwlora.errors import GridError, SourceError
from qwlora.formats.assemble_model import LazyModel
from qwlora.formats.base_files import BaseWriter
from qwlora.formats.meta_model import Place, is_below, tensor_at
from qwlora.nn import tie_weights_


class BlocksOnDemand:
    """The blocks of `lazy.model`, each in memory while batches are in it. A context manager around
    `quantize_blocks_`.

    Args:
        writer: gets each block when it is released, and the rest if the context is left without an
            error.
        blocks: the tensors to quantize in each block, by its path (see `tensors_by_block`).
        batches: number of batches that run through the model.

    Raises:
        SourceError: a tensor cannot be read, or one to quantize is already integers.
        GridError: the model runs a block again that was released.
    """

    def __init__(
        self, lazy: LazyModel, writer: BaseWriter, blocks: Mapping[str, Sequence[str]], batches: int
    ):
        self.lazy, self.writer, self.blocks, self.batches = lazy, writer, blocks, batches
        self._arrivals = dict.fromkeys(blocks, 0)
        self._order: list[str] = []
        self._released: set[str] = set()
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> BlocksOnDemand:
        self.lazy.load_outside_(self.blocks)
        for path in self.blocks:
            hook = self._hook(path)
            self._hooks.append(self.lazy.model.get_submodule(path).register_forward_pre_hook(hook))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is not None:
            return
        tie_weights_(self.lazy.model)
        self.writer.add(self.lazy.model)

    def _hook(self, path: str) -> Any:
        def arrived(module: nn.Module, args: tuple[Any, ...]) -> None:
            if path in self._released:
                raise GridError(
                    f"{path} runs again after a later block, so this model cannot be quantized "
                    "block by "
                    "block from its files. Load the whole model."
                )
            if not self._arrivals[path]:
                self._order.append(path)
                self.lazy.materialize_(path)
                self._check_floats(self.blocks[path])
            self._arrivals[path] += 1
            if self._arrivals[path] == self.batches and len(self._order) > 1:
                self._release(self._order[-2])

        return arrived

    def _release(self, path: str) -> None:
        """Write a block and keep only its shapes, unless a tensor in it is also read elsewhere."""
        if any(
            self._is_shared(name)
            for name, places in self.lazy.places.items()
            if any(is_below(place, path) for place in places)
        ):
            return
        self._released.add(path)
        block = self.lazy.model.get_submodule(path)
        self.writer.add(block, path)
        block.to("meta")

    def _block_of(self, place: Place) -> str | None:
        return next((path for path in self.blocks if is_below(place, path)), None)

    def _is_shared(self, name: str) -> bool:
        return len({self._block_of(place) for place in self.lazy.places[name]}) > 1

    def _check_floats(self, names: Sequence[str]) -> None:
        for name in names:
            if tensor_at(self.lazy.model, self.lazy.places[name][0]) is None:
                raise SourceError(
                    f"{name} is already integers in the files. Omit the scheme to keep them, or "
                    "give a float checkpoint."
                )
