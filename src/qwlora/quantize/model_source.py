"""Where the driver takes the float tensors of a model from: memory, or files larger than memory.

    modules(plan)            the names in `plan`, each when its tensor can be read; for solvers that
                             need no data
    blocks(blocks, batches)  a context in which the model can be run block by block

In memory there is nothing to do. From files, peak memory with `modules` is one module as floats (a
linear layer, an embedding, a layer's fused experts), what its solver needs, and one shard. With
`blocks`:

    loaded     tensors outside all blocks (embeddings, last norm, head): at the start
               a block: when the first batch arrives at it
    released   a block: written to disk when the last batch has arrived at the next block
               everything else: at the end

so that memory holds what is outside the blocks, one block as floats (two while batches move on)
with its moments and the activations of a batch, one shard, and the hidden states of the batches. A
tensor that is read both inside a block and elsewhere is kept to the end. A block that runs again
after the next one is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from qwlora.errors import GridError, SourceError
from qwlora.formats.base_files import BaseWriter
from qwlora.formats.meta_model import LazyModel, is_below, put_, tensor_at
from qwlora.nn import tie_weights_
from qwlora.system.progress import Track


class InMemory:
    """A model whose float tensors are in memory."""

    def __init__(self, model: nn.Module):
        self.model = model

    def modules(self, plan: Collection[str], track: Track) -> Iterator[str]:
        yield from track(list(plan), "quantizing", len(plan))

    @contextmanager
    def blocks(self, blocks: Mapping[str, Sequence[str]], batches: int) -> Iterator[None]:
        yield


class InFiles:
    """A checkpoint whose modules are in memory until they are quantized and go to `writer`."""

    def __init__(self, lazy: LazyModel, writer: BaseWriter):
        self.lazy, self.writer, self.model = lazy, writer, lazy.model

    def modules(self, plan: Collection[str], track: Track) -> Iterator[str]:
        modules: dict[str, list[str]] = {}
        for name in self.lazy.stored:
            modules.setdefault(name.rpartition(".")[0], []).append(name)
        for path in track(list(modules), "quantizing", len(modules)):
            for name in modules[path]:
                self.lazy.load_(name)
                if name in plan:
                    self._check_float(name)
                    yield name
            self.writer.add(self.model.get_submodule(path), path)
            for name in modules[path]:  # keep only the shapes, packed or not
                if (tensor := tensor_at(self.model, name)) is None:
                    self.model.get_submodule(path).to("meta")
                else:
                    put_(self.model, self.lazy.aliases[name], tensor.to("meta"))

    @contextmanager
    def blocks(self, blocks: Mapping[str, Sequence[str]], batches: int) -> Iterator[None]:
        arrivals = dict.fromkeys(blocks, 0)
        visited, released = list[str](), set[str]()

        def arrived(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            if path in released:
                raise GridError(
                    f"{path} runs again after a later block, so this model cannot be quantized "
                    "block by block from its files. Load the whole model."
                )
            if not arrivals[path]:
                visited.append(path)
                self.lazy.materialize_(path)
                for name in blocks[path]:
                    self._check_float(name)
            arrivals[path] += 1
            if arrivals[path] == batches and len(visited) > 1:
                block = visited[-2]
                if not self._is_shared(block, blocks):
                    released.add(block)
                    self.writer.add(self.model.get_submodule(block), block)
                    self.model.get_submodule(block).to("meta")

        self.lazy.load_outside_(blocks)
        with ExitStack() as stack:
            for path in blocks:
                module = self.model.get_submodule(path)
                hook = module.register_forward_pre_hook(partial(arrived, path))
                stack.callback(hook.remove)
            yield
        tie_weights_(self.model)
        self.writer.add(self.model)

    def _is_shared(self, block: str, blocks: Collection[str]) -> bool:
        """Whether a tensor of the block is read elsewhere too."""
        for names in self.lazy.aliases.values():
            readers = {next((p for p in blocks if is_below(name, p)), None) for name in names}
            if block in readers and len(readers) > 1:
                return True
        return False

    def _check_float(self, name: str) -> None:
        if tensor_at(self.model, name) is None:
            raise SourceError(
                f"{name} is already integers in the files. Omit the scheme to keep them, or start "
                "from a float checkpoint."
            )
