"""From a checkpoint to a model, tensor by tensor.

    load_precomputed(checkpoint)     the whole model: integers packed as the files hold them, the rest float32
    LazyModel(checkpoint)            a model without data, of which parts are loaded and let go: how a model larger than memory is quantized

A tensor is read, packed if it is integers, and put in its place; nothing else of the files is in memory, so the peak is the model as it will be, and one
tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from qwlora.errors import GridError, SourceError, reading
from qwlora.formats.checkpoint import Checkpoint
from qwlora.formats.meta_model import (
    Place,
    blocks_of,
    empty_model,
    is_below,
    place_name,
    put_,
    tensor_at,
    tensor_places,
)
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.messages import listed
from qwlora.nn import pack_at_, tie_weights_
from qwlora.nn.fingerprint import remember_floats_
from qwlora.nn.finite import check_finite
from qwlora.progress import Track, untracked


def load_precomputed(checkpoint: Checkpoint, track: Track = untracked) -> PreTrainedModel:
    """The model of `checkpoint`, with packed layers wherever it holds integers.

    Raises:
        SourceError: names are missing or unknown, or shapes differ (all are named), or a tensor cannot be read.
    """
    lazy = LazyModel(checkpoint)
    lazy.materialize_(track=track)
    remember_floats_(lazy.model)
    return lazy.model


class LazyModel:
    """A model without data, beside the checkpoint that has them.

    `model` is frozen and in evaluation mode. What is done to a part between `materialize_` and `release_` stays: a layer that was replaced by a packed one is
    neither loaded nor let go again.

    Raises:
        SourceError: the configuration builds no causal language model, or names are missing or unknown (all are named).
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.model = empty_model(checkpoint.config, len(checkpoint.names()))
        folder = getattr(checkpoint, "folder", None)  # of a checkpoint that is one
        if folder is not None and (folder / "generation_config.json").is_file():
            with reading(folder / "generation_config.json"):
                self.model.generation_config = GenerationConfig.from_pretrained(folder)
        self.places = tensor_places(self.model)
        first = {
            place_name(place): name for name, places in self.places.items() for place in places
        }
        self.stored = {
            first.get(name, name): name for name in checkpoint.names()
        }  # a tied tensor may be stored under any of its names
        if wrong := _wrong_names(set(self.stored), set(self.places)):
            raise SourceError(
                f"the files and config.json ({type(self.model).__name__}) disagree: {wrong}. Is the configuration another model's?"
            )

    def materialize_(self, path: str = "", track: Track = untracked) -> nn.Module:
        """Load what is below module `path` and has no data yet: floats as float32, integers packed. Returns the module that is there now.

        Raises:
            SourceError: a tensor cannot be read, or has another shape than its parameter.
        """
        names = [
            name
            for name in self.stored
            if any(is_below(place, path) for place in self._waiting(name))
        ]
        for name in track(names, "reading", len(names)):
            self.load_(name)
        return self.model.get_submodule(path)

    def load_outside_(self, paths: Collection[str]) -> None:
        """Load every tensor that is read outside the modules at `paths`, wherever else it is read."""
        for name in self.stored:
            if not all(any(is_below(place, path) for path in paths) for place in self.places[name]):
                self.load_(name)

    def release_(self, path: str = "") -> None:
        """Let go of the floats that are read below module `path` only; packed layers stay."""
        for places in self.places.values():
            there = [place for place in places if tensor_at(self.model, place) is not None]
            if there and all(is_below(place, path) for place in there):
                tensor = tensor_at(self.model, there[0])
                assert tensor is not None
                put_(self.model, there, tensor.to("meta"))

    @contextmanager
    def in_passing(self) -> Iterator[PreTrainedModel]:
        """The model, ready to run: its blocks (members of outermost module lists) have their data only while they run, what is in none of them throughout."""
        blocks = [
            path
            for path in blocks_of(self.model)
            if type(self.model.get_submodule(path)).forward is not nn.Module.forward
        ]
        self.load_outside_(blocks)
        hooks = []
        for path in blocks:
            block = self.model.get_submodule(path)
            hooks += [
                block.register_forward_pre_hook(_ignoring(self.materialize_, path)),
                block.register_forward_hook(_ignoring(self.release_, path)),
            ]
        try:
            yield self.model
        finally:
            for hook in hooks:
                hook.remove()
            self.release_()

    def _waiting(self, name: str) -> list[Place]:
        """The places of a tensor that are still part of the model, and without data."""
        found = ((place, tensor_at(self.model, place)) for place in self.places[name])
        return [place for place, tensor in found if tensor is not None and tensor.is_meta]

    def load_(self, name: str) -> None:
        """Load one tensor, by its parameter's name, if it has no data yet; see `materialize_`."""
        places = self._waiting(name)
        if not places:
            return
        value = self.checkpoint.read(self.stored[name])
        if isinstance(value, QuantizedTensor):
            self._pack_(name, value)
            return
        expected = tensor_at(self.model, places[0])
        assert expected is not None
        if value.shape != expected.shape:
            raise SourceError(
                f"{name} has shape {list(value.shape)} in the files, but {list(expected.shape)} in the model that config.json builds"
            )
        check_finite(name, value, allow_infinity=not isinstance(expected, nn.Parameter))
        put_(self.model, places, value.to(torch.float32) if value.is_floating_point() else value)

    def _pack_(self, name: str, value: QuantizedTensor) -> None:
        try:
            pack_at_(self.model, name, value)
        except GridError as error:
            raise SourceError(
                f"{name} is {value.encoding.scheme} in the files, and cannot be packed: {error}"
            ) from error
        if len(self.places[name]) > 1:
            tie_weights_(self.model)


def _ignoring(action: Callable[[str], object], path: str) -> Callable[..., None]:
    """`action(path)`, whatever a hook is given."""

    def hook(*given: object) -> None:
        action(path)

    return hook


def _wrong_names(stored: set[str], expected: set[str]) -> str:
    parts = [(expected - stored, "missing"), (stored - expected, "unknown to the model")]
    return "; ".join(f"{what}: {listed(sorted(names))}" for names, what in parts if names)
