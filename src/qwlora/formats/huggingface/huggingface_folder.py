"""Hugging Face folders as `Checkpoint`: the base class of the GPTQ, AWQ, compressed-tensors and MLX
readers.

`FolderCheckpoint` reads config.json and maps stored names to the model's parameters. A format only
supplies a `Stored`, which reads tensors under the float model's names
(`model.layers.0.mlp.down_proj.weight`), however the files store them. `FloatCheckpoint` is a folder
of float tensors; there, the safetensors files themselves are the `Stored`.
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

from qwlora.errors import SourceError
from qwlora.formats.checkpoint import ShownCheckpoint
from qwlora.formats.huggingface.model_config import read_config
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.huggingface.transformers_names import Origin, convert_quantized, origins
from qwlora.formats.meta_model import meta_model
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.messages import listed


class Stored(Protocol):
    """Tensors of a checkpoint, under the float model's names."""

    def names(self) -> Sequence[str]:
        """All names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the values, `[out, in]` for integers; reads no tensor data."""
        ...

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Read one tensor."""
        ...


class FolderCheckpoint(ShownCheckpoint):
    """A checkpoint in a Hugging Face folder.

    Args:
        folder: a folder with config.json and safetensors files.
        stored: creates the format's reader from the safetensors files.

    Raises:
        SourceError: the configuration cannot be read, a parameter of its model is missing, a stored
            tensor is not a parameter of the model, or a shape differs.
    """

    def __init__(self, folder: str | Path, stored: Callable[[SafetensorsFiles], Stored]):
        self.folder = self.path = Path(folder)
        # mapping would gain nothing: most tensors are read once, and then unpacked or converted
        self.files = SafetensorsFiles(self.folder, mapped=False)
        self.stored = stored(self.files)
        self.config = read_config(self.folder, len(self.files.names()))
        self._origins = self._found_origins()

    def names(self) -> list[str]:
        """Names of parameters and saved buffers in the model's order, tied tensors once."""
        return list(self._origins)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Read one parameter or saved buffer, as integers `[out, in]` if it is stored as integers.

        Raises:
            SourceError: there is no such parameter, or its stored tensors cannot be read.
        """
        if name not in self._origins:
            raise SourceError(
                f"{self._where}: {name!r} is not a parameter of {type(self.model).__name__} (tied "
                "parameters have the first of their names)"
            )
        first, *copies = [self._made(alias, origin) for alias, origin in self._origins[name]]
        if any(not _same(first, copy) for copy in copies):
            aliases = " and ".join(repr(alias) for alias, _ in self._origins[name])
            raise SourceError(
                f"{self._where}: config.json ties {aliases}, but the files hold different values "
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
            return meta_model(self.config)
        except SourceError as error:
            raise SourceError(f"{self._where}: {error}") from error

    @property
    def _where(self) -> str:
        return repr(str(self.folder))

    def _made(self, target: str, origin: Origin) -> Tensor | QuantizedTensor:
        parts = {stored: self.stored.read(stored) for stored, _ in origin.sources}
        floats = {stored: part for stored, part in parts.items() if isinstance(part, Tensor)}
        integers = {
            stored: part for stored, part in parts.items() if isinstance(part, QuantizedTensor)
        }
        if floats and integers:
            names = f"{next(iter(floats))} is float and {next(iter(integers))} integers"
            raise SourceError(
                f"{self._where}: parameter {target!r} is stored in several tensors, some float and "
                f"some integer ({names}). Quantize the float model instead"
            )
        return (
            origin.convert(self.model, floats)[target]
            if floats
            else convert_quantized(origin, self.model, integers, self._where)[target]
        )

    def _found_origins(self) -> dict[str, list[tuple[str, Origin]]]:
        """The stored tensors of each parameter; several entries if copies of a tied tensor are
        stored."""
        stored = {name: self.stored.shape(name) for name in self.stored.names()}
        found, unknown = origins(self.model, stored, self._where)
        unknown = [name for name in unknown if not self._is_empty_bias(name)]
        if unknown:
            raise SourceError(
                f"{self._where}: {_listed(unknown)} in the files, but not in "
                f"{type(self.model).__name__}, which config.json describes. "
                "Either config.json belongs to another model, or the model needs a newer "
                "transformers"
            )
        tied: dict[int, list[str]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            tied.setdefault(id(tensor), []).append(name)
        result = {
            aliases[0]: [(alias, found[alias]) for alias in aliases if alias in found]
            for aliases in tied.values()
        }
        if missing := [name for name, copies in result.items() if not copies]:
            raise SourceError(
                f"{self._where}: {_listed(missing)} missing from the files, but needed by the "
                "model that config.json describes; download the model again"
            )
        for copies in result.values():
            for alias, origin in copies:
                self._check_shape(alias, origin, stored)
        return result

    def _check_shape(self, name: str, origin: Origin, stored: dict[str, tuple[int, ...]]) -> None:
        made = origin.convert(
            self.model,
            {source: torch.empty(stored[source], device="meta") for source, _ in origin.sources},
        )
        found, expected = tuple(made[name].shape), tuple(self.model.state_dict()[name].shape)
        if found not in (expected, self._matrix_shape(name, expected)):
            raise SourceError(
                f"{self._where}: {name!r} has shape {list(found)} in the files, but "
                f"{list(expected)} in the model that config.json describes; download the model "
                "again"
            )

    def _matrix_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that integers are stored in: `[out, in]`, also for a Conv1D, whose weight is
        `[in, out]`."""
        transposed = (
            isinstance(self.model.get_submodule(name.rpartition(".")[0]), Conv1D)
            and len(shape) == 2
        )
        return shape[::-1] if transposed else shape

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
