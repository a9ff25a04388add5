"""Hugging Face folders as `Checkpoint`: the base class of the GPTQ, AWQ, compressed-tensors and MLX
readers.

`FolderCheckpoint` reads config.json and maps stored names to the model's parameters. A format only
supplies a `FormatReader`, which reads tensors under the float model's names
(`model.layers.0.mlp.down_proj.weight`), however the files store them. `FloatCheckpoint` is a folder
of float tensors; there, the safetensors files themselves are the `FormatReader`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwlora.errors import SourceError, listed
from qwlora.formats.checkpoint import ShownCheckpoint
from qwlora.formats.huggingface.model_config import read_config
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.huggingface.transformers_names import StoredTensors, convert_quantized, origins
from qwlora.formats.meta_model import empty_model
from qwlora.grid.quantized_tensor import QuantizedTensor


class FormatReader(Protocol):
    """Tensors of a checkpoint, under the float model's names."""

    def names(self) -> Sequence[str]:
        """All names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the values, `[out, in]` for integers; reads no tensor data."""
        ...

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Read one tensor.

        Raises:
            SourceError: the tensors of a layer do not fit each other or the settings, or a scale or
                zero point is invalid.
        """
        ...


class FolderCheckpoint(ShownCheckpoint):
    """A checkpoint in a Hugging Face folder.

    Args:
        folder: a folder with config.json and safetensors files.
        reader: creates the format's reader from the safetensors files.

    Raises:
        SourceError: the configuration cannot be read, a parameter of its model is missing, a stored
            tensor is not a parameter of the model, or a shape differs.
    """

    def __init__(self, folder: str | Path, reader: Callable[[SafetensorsFiles], FormatReader]):
        self.folder = self.path = Path(folder)
        # mapping would gain nothing: most tensors are read once, and then unpacked or converted
        self.files = SafetensorsFiles(self.folder, mapped=False)
        self.stored = reader(self.files)
        self.config = read_config(self.folder, len(self.files.names()))
        # several entries for a tied tensor if copies of it are stored
        self._origins: dict[str, list[tuple[str, StoredTensors]]] = {}
        self._find_origins_()

    def names(self) -> list[str]:
        return list(self._origins)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        if name not in self._origins:
            raise self._error(
                f"{name!r} is not a parameter of {type(self.model).__name__} (tied "
                "parameters have the first of their names)"
            )
        first, *copies = [self._converted(*copy) for copy in self._origins[name]]
        if any(not _same(first, copy) for copy in copies):
            aliases = " and ".join(repr(alias) for alias, _ in self._origins[name])
            raise self._error(
                f"config.json ties {aliases}, but the files hold different values "
                "for them. Set tie_word_embeddings to false in config.json"
            )
        return first

    def stored_names(self, name: str) -> list[str]:
        """The stored tensors of one parameter: several if its parts (experts, projections) were
        saved separately."""
        return [stored for _, origin in self._origins[name] for stored, _ in origin.sources]

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model that config.json describes, without data."""
        try:
            return empty_model(self.config, buffers=False)
        except SourceError as error:
            raise self._error(str(error)) from error

    def _error(self, problem: str) -> SourceError:
        return SourceError(f"{str(self.folder)!r}: {problem}")

    def _converted(self, target: str, origin: StoredTensors) -> Tensor | QuantizedTensor:
        """A parameter, made from its stored tensors."""
        floats: dict[str, Tensor] = {}
        integers: dict[str, QuantizedTensor] = {}
        for stored, _ in origin.sources:
            part = self.stored.read(stored)
            if isinstance(part, Tensor):
                floats[stored] = part
            else:
                integers[stored] = part
        if floats and integers:
            raise self._error(
                f"parameter {target!r} is stored in several tensors, some float and some integer "
                f"({next(iter(floats))} is float and {next(iter(integers))} integers). Quantize "
                "the float model instead"
            )
        if floats:
            return origin.convert(self.model, floats)[target]
        return convert_quantized(origin, self.model, integers, repr(str(self.folder)))[target]

    def _find_origins_(self) -> None:
        """Find the stored tensors of each parameter, and compare names and shapes."""
        stored = {name: self.stored.shape(name) for name in self.stored.names()}
        by_target, unknown = origins(self.model, stored, repr(str(self.folder)))
        kind = type(self.model).__name__
        if unknown := [name for name in unknown if not self._is_empty_bias(name)]:
            raise self._error(
                f"{_listed(unknown)} in the files, but not in {kind}, which config.json describes. "
                "Either config.json belongs to another model, or the model needs a newer "
                "transformers"
            )
        tied: dict[int, list[str]] = {}
        parameters = self.model.state_dict(keep_vars=True)
        for name, tensor in parameters.items():
            tied.setdefault(id(tensor), []).append(name)
        for names in tied.values():
            copies = [(alias, by_target[alias]) for alias in names if alias in by_target]
            self._origins[names[0]] = copies
        if missing := [name for name, copies in self._origins.items() if not copies]:
            raise self._error(
                f"{_listed(missing)} missing from the files, but needed by the "
                "model that config.json describes; download the model again"
            )
        for name, origin in (copy for copies in self._origins.values() for copy in copies):
            sources = {s: torch.empty(stored[s], device="meta") for s, _ in origin.sources}
            shape = tuple(origin.convert(self.model, sources)[name].shape)
            expected = tuple(parameters[name].shape)
            is_conv1d = isinstance(self.model.get_submodule(name.rpartition(".")[0]), Conv1D)
            # integers are stored as [out, in], the weight of a Conv1D is [in, out]
            if shape != expected and not (is_conv1d and shape == expected[::-1]):
                raise self._error(
                    f"{name!r} has shape {list(shape)} in the files, but {list(expected)} in the "
                    "model that config.json describes; download the model again"
                )

    def _is_empty_bias(self, name: str) -> bool:
        """Whether a stored bias that the model lacks is all zeros; GPTQ tools write one for every
        layer."""
        if not name.endswith(".bias"):
            return False
        value = self.stored.read(name)
        return isinstance(value, Tensor) and not bool(value.any())


class FloatCheckpoint(FolderCheckpoint):
    """A folder of float tensors.

    Raises:
        SourceError: as `FolderCheckpoint`.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder, lambda files: files)


def _same(a: Tensor | QuantizedTensor, b: Tensor | QuantizedTensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor) and a.equals(b)


def _listed(names: list[str]) -> str:
    return f"{listed(map(repr, names))} {'is' if len(names) == 1 else 'are'}"
