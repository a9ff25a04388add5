"""Builds a model from a checkpoint, tensor by tensor.

    load_precomputed(checkpoint)    the whole model: stored integers become packed layers, the rest
                                    float32
    LazyModel(checkpoint)           a model whose modules are loaded and released one by one, to
                                    quantize models larger than memory

Tensors are read one at a time, so the peak memory is the finished model plus one tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from qwlora.errors import GridError, SourceError, listed
from qwlora.formats.base_files import save_as_base_
from qwlora.formats.checkpoint import Checkpoint
from qwlora.formats.meta_model import (
    blocks_of,
    empty_model,
    is_below,
    put_,
    read_generation_config_,
    tensor_at,
    tensor_names,
)
from qwlora.grid.encoding import QuantizedTensor
from qwlora.nn import pack_at_, tie_weights_
from qwlora.nn.fingerprint import remember_floats_
from qwlora.nn.frozen import check_finite
from qwlora.system.progress import Track, untracked


def load_precomputed(checkpoint: Checkpoint, track: Track = untracked) -> PreTrainedModel:
    """Build the model of `checkpoint`, with packed layers wherever the checkpoint has integers.

    Raises:
        SourceError: tensors are missing or unknown (the message lists them), have the wrong shape,
            or cannot be read.
    """
    lazy = LazyModel(checkpoint)
    lazy.materialize_(track=track)
    remember_floats_(lazy.model)
    save_as_base_(lazy.model)
    return lazy.model


class LazyModel:
    """A model on the meta device whose modules are loaded from a checkpoint when they are needed.

    `model` is frozen and in evaluation mode. Changes made between `materialize_` and `release_`
    persist: a layer that was replaced by a packed layer is not loaded or released again.

    Raises:
        SourceError: the configuration does not describe a causal language model, or tensors are
            missing or unknown (the message lists them).
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.model = empty_model(checkpoint.config)
        read_generation_config_(self.model, checkpoint.path)
        self.aliases = tensor_names(self.model)
        first = {alias: name for name, aliases in self.aliases.items() for alias in aliases}
        # a tied tensor may be stored under any of its names
        self.stored = {first.get(name, name): name for name in checkpoint.names()}
        missing = self.aliases.keys() - self.stored.keys()
        unknown = self.stored.keys() - self.aliases.keys()
        if missing or unknown:
            raise SourceError(
                f"the files and config.json ({type(self.model).__name__}) do not match: missing: "
                f"{listed(sorted(missing))}; unknown to the model: {listed(sorted(unknown))}. "
                "Check that config.json belongs to this model, or download the model again"
            )

    def materialize_(self, path: str = "", track: Track = untracked) -> nn.Module:
        """Load all tensors in module `path` that have no data yet, and return the module.

        Floats become float32, integers packed layers, which may replace the module.

        Raises:
            SourceError: a tensor cannot be read, or its shape differs from its parameter's.
        """
        names = [n for n in self.stored if any(is_below(a, path) for a in self._waiting(n))]
        for name in track(names, "reading", len(names)):
            self.load_(name)
        return self.model.get_submodule(path)

    def load_outside_(self, paths: Collection[str]) -> None:
        """Load every tensor that is used outside the modules at `paths`, even if also used
        inside."""
        for name in self.stored:
            if not all(
                any(is_below(alias, path) for path in paths) for alias in self.aliases[name]
            ):
                self.load_(name)

    def release_(self, path: str = "") -> None:
        """Drop the data of float tensors that are used only in module `path`; packed layers
        stay."""
        for aliases in self.aliases.values():
            tensors = {a: t for a in aliases if (t := tensor_at(self.model, a)) is not None}
            if tensors and all(is_below(alias, path) for alias in tensors):
                put_(self.model, tensors, next(iter(tensors.values())).to("meta"))

    @contextmanager
    def one_block_at_a_time(self) -> Iterator[PreTrainedModel]:
        """The model, ready to run. Each block (see `blocks_of`) is loaded only while it runs;
        everything outside blocks stays loaded."""
        blocks = [
            path
            for path in blocks_of(self.model)
            if type(self.model.get_submodule(path)).forward is not nn.Module.forward
        ]
        self.load_outside_(blocks)
        with ExitStack() as stack:
            stack.callback(self.release_)
            for path in blocks:
                block = self.model.get_submodule(path)
                loading = block.register_forward_pre_hook(partial(self._load_block_, path))
                releasing = block.register_forward_hook(partial(self._release_block_, path))
                stack.callback(loading.remove)
                stack.callback(releasing.remove)
            yield self.model

    def _load_block_(self, path: str, *ignored: object) -> None:
        self.materialize_(path)

    def _release_block_(self, path: str, *ignored: object) -> None:
        self.release_(path)

    def _waiting(self, name: str) -> list[str]:
        """The names of a tensor that still exist in the model and have no data."""
        tensors = {alias: tensor_at(self.model, alias) for alias in self.aliases[name]}
        return [alias for alias, tensor in tensors.items() if tensor is not None and tensor.is_meta]

    def load_(self, name: str) -> None:
        """Load one parameter or buffer by name if it has no data yet; see `materialize_`."""
        aliases = self._waiting(name)
        if not aliases:
            return
        value = self.checkpoint.read(self.stored[name])
        if isinstance(value, QuantizedTensor):
            try:
                pack_at_(self.model, name, value)
            except GridError as error:
                raise SourceError(
                    f"{name} is {value.encoding.scheme} in the files and cannot be packed: {error}"
                ) from error
            if len(self.aliases[name]) > 1:
                tie_weights_(self.model)
            return
        expected = tensor_at(self.model, aliases[0])
        assert expected is not None
        if value.shape != expected.shape:
            raise SourceError(
                f"{name} has shape {list(value.shape)} in the files, but {list(expected.shape)} in "
                "the model that config.json describes; download the model again"
            )
        check_finite(name, value, allow_infinity=not isinstance(expected, nn.Parameter))
        put_(self.model, aliases, value.to(torch.float32) if value.is_floating_point() else value)
