"""A Hugging Face folder as a `Checkpoint`: the configuration, the model's parameter names, and the tensors that make each of them.

What differs between formats is how a stored tensor is read, which is a `Stored`: tensors under Hugging Face's names for the float model
(`model.layers.0.mlp.down_proj.weight`), whatever tensors the file keeps for them. `FloatCheckpoint` is the folder whose stored tensors are the files' own.
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
from qwlora.formats.meta_model import meta_model
from qwlora.formats.model_config import read_config
from qwlora.formats.safetensors_files import SafetensorsFiles
from qwlora.formats.transformers_names import Origin, convert_quantized, origins
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.messages import listed


class Stored(Protocol):
    """Tensors under the names that the checkpoint has for the float model."""

    def names(self) -> Sequence[str]:
        """All names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the values, which for integers is `[out, in]`; no tensor is read."""
        ...

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """One tensor."""
        ...


class FolderCheckpoint:
    """A folder whose tensors `stored` reads.

    Args:
        folder: config.json and safetensors files.
        stored: makes the reader of the mapped files.

    Raises:
        SourceError: the configuration cannot be read, a parameter of its model is missing, a stored tensor is no parameter of it, or a shape differs.
    """

    def __init__(self, folder: str | Path, stored: Callable[[SafetensorsFiles], Stored]):
        self.folder = Path(folder)
        self.files = SafetensorsFiles(
            self.folder, mapped=False
        )  # tensors are unpacked or widened anyway, and most are asked for once
        self.stored = stored(self.files)
        self.config = read_config(self.folder, len(self.files.names()))
        self._origins = self._found_origins()

    def names(self) -> list[str]:
        """Parameters and saved buffers in the model's order, a tied tensor once."""
        return list(self._origins)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """One parameter or saved buffer; integers `[out, in]` if the files hold integers for it.

        Raises:
            SourceError: there is no such parameter, or its stored tensors cannot be read.
        """
        if name not in self._origins:
            raise SourceError(
                f"{self._where}: {name!r} is no parameter of {type(self.model).__name__} (of tied ones, the first counts)"
            )
        first, *copies = [self._made(alias, origin) for alias, origin in self._origins[name]]
        if any(not _same(first, copy) for copy in copies):
            aliases = " and ".join(repr(alias) for alias, _ in self._origins[name])
            raise SourceError(
                f"{self._where}: config.json ties {aliases}, but the files hold different values for them; set tie_word_embeddings to false in config.json"
            )
        return first

    def stored_names(self, name: str) -> list[str]:
        """What the files hold for one parameter: stored names, several where parts (experts, projections) were saved one by one."""
        return [stored for _, origin in self._origins[name] for stored, _ in origin.sources]

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model that the configuration builds, without data."""
        try:
            return meta_model(self.config, len(self.stored.names()))
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
                f"{self._where}: parameter {target!r} is made of both ({names}), and one tensor has one grid"
            )
        return (
            origin.convert(self.model, floats)[target]
            if floats
            else convert_quantized(origin, self.model, integers, self._where)[target]
        )

    def _found_origins(self) -> dict[str, list[tuple[str, Origin]]]:
        """For each parameter, its stored names: one, unless copies of a tied tensor are stored too."""
        stored = {name: self.stored.shape(name) for name in self.stored.names()}
        found, unknown = origins(self.model, stored, self._where)
        unknown = [name for name in unknown if not self._is_empty_bias(name)]
        if unknown:
            raise SourceError(
                f"{self._where}: {_listed(unknown)} in the files, but no parameter of {type(self.model).__name__}, which config.json builds; "
                "if the files are right, config.json belongs to another model or needs a newer transformers"
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
                f"{self._where}: {_listed(missing)} missing from the files, which config.json's model needs; download the model again"
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
                f"{self._where}: {name!r} has shape {list(found)} in the files, but {list(expected)} in config.json's model"
            )

    def _matrix_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`[out, in]` of a layer that keeps its weight `[in, out]`: integers are stored that way round."""
        transposed = (
            isinstance(self.model.get_submodule(name.rpartition(".")[0]), Conv1D)
            and len(shape) == 2
        )
        return shape[::-1] if transposed else shape

    def _is_empty_bias(self, name: str) -> bool:
        """GPTQ writers give every layer a bias; zeros say nothing about one that the model does not have."""
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
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return (
        torch.equal(a.codes, b.codes)
        and torch.equal(a.encoding.scale, b.encoding.scale)
        and a.encoding.scheme == b.encoding.scheme
    )


def _listed(names: list[str]) -> str:
    return f"{listed(map(repr, names))} {'is' if len(names) == 1 else 'are'}"
