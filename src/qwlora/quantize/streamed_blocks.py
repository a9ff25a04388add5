"""Parts of a model that are there only while they are needed: how a solver that follows a layer's
inputs works through a model larger than memory.

    load        what is below no part (embeddings, the last norm, the head), before the first batch starts
                a part, when the first batch arrives at it
    let go      a part, to the base on disk, when the last batch has arrived at the part behind it; the rest at the end

So the peak is what is below no part, one part as floats (two while batches change over) with its
moments and the activations of a batch in it, one shard, and the hidden states of the batches.
Arrivals are seen by hooks on the parts; who drives the batches (`quantize_blocks_`) knows nothing
of it.

A tensor that is read both inside a part and elsewhere stays to the end. A part that is run again
after the one behind it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from qwlora.errors import GridError, SourceError
from qwlora.formats.assemble_model import LazyModel
from qwlora.formats.base_folder import BaseWriter
from qwlora.formats.meta_model import Place, is_below, tensor_at
from qwlora.nn import tie_weights_


class BlocksOnDemand:
    """The parts of `lazy.model`, each there while batches are in it; use as a context manager
    around `quantize_blocks_`.

    Args:
        writer: takes each part when it is let go, and the rest when the context is left without an
            error.
        parts: the tensors to quantize in each part, by its path (see `tensors_by_block`).
        batches: how many pass through the model.

    Raises:
        SourceError: a tensor cannot be read, or one to quantize is integers already.
        GridError: the model runs a part again that was let go.
    """

    def __init__(
        self, lazy: LazyModel, writer: BaseWriter, parts: Mapping[str, Sequence[str]], batches: int
    ):
        self.lazy, self.writer, self.parts, self.batches = lazy, writer, parts, batches
        self._arrivals = dict.fromkeys(parts, 0)
        self._order: list[str] = []
        self._gone: set[str] = set()
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> BlocksOnDemand:
        self.lazy.load_outside_(self.parts)
        for path in self.parts:
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
            if path in self._gone:
                raise GridError(
                    f"{path} runs again after a part behind it, so this model cannot be quantized "
                    "part by part from its files; load it whole"
                )
            if not self._arrivals[path]:
                self._order.append(path)
                self.lazy.materialize_(path)
                self._check_floats(self.parts[path])
            self._arrivals[path] += 1
            if self._arrivals[path] == self.batches and len(self._order) > 1:
                self._let_go(self._order[-2])

        return arrived

    def _let_go(self, path: str) -> None:
        """Write a part and keep its shapes, unless something in it is read elsewhere too."""
        if any(
            self._is_shared(name)
            for name, places in self.lazy.places.items()
            if any(is_below(place, path) for place in places)
        ):
            return
        self._gone.add(path)
        part = self.lazy.model.get_submodule(path)
        self.writer.add(part, path)
        part.to("meta")

    def _part_of(self, place: Place) -> str | None:
        return next((path for path in self.parts if is_below(place, path)), None)

    def _is_shared(self, name: str) -> bool:
        return len({self._part_of(place) for place in self.lazy.places[name]}) > 1

    def _check_floats(self, names: Sequence[str]) -> None:
        for name in names:
            if tensor_at(self.lazy.model, self.lazy.places[name][0]) is None:
                raise SourceError(
                    f"{name} is integers already in the files; leave the scheme out to keep them, "
                    "or start from a float checkpoint"
                )
