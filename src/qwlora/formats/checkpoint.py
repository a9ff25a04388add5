"""Base classes of all checkpoint readers: tensors by Hugging Face parameter name, one at a time.

A tensor that is stored as integers is read as a `QuantizedTensor`, any other as a float tensor. A
reader loads a tensor only when it is asked for, so the whole model is never in memory as floats.

Where stored tensors have other names than parameters, an `Origin` says how a parameter is made of
them. A reader finds the origins, and `MappedCheckpoint` compares them with the model: all
parameters are there, and copies of a tied tensor are equal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from qwlora.errors import SourceError, listed
from qwlora.grid.encoding import QuantizedTensor


class Checkpoint(ABC):
    """The stored tensors of one model.

    Attributes:
        config: the Hugging Face configuration, without its `quantization_config`.
        path: the file, or the folder of the files, which may also hold a generation_config.json.
    """

    config: PretrainedConfig
    path: Path

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Parameter names of the model that `config` builds
        (`model.layers.0.mlp.down_proj.weight`), tied tensors once, in the model's order if that is
        known."""

    @abstractmethod
    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Read one tensor, as integers `[out, in]` if it is stored as integers.

        Raises:
            SourceError: the tensor cannot be read, or no `Encoding` can express how it is stored.
                The message names the tensor and the format.
        """

    def __repr__(self) -> str:
        kind, model, count = type(self).__name__, self.config.model_type, len(self.names())
        return f"{kind} of {model} with {count} tensors in {str(self.path)!r}"


@dataclass(frozen=True)
class Origin:
    """The stored tensors of one parameter, and the conversion to it.

    Args:
        target: the parameter's name.
        sources: names of the stored tensors.
        convert_all: makes this parameter, and maybe others, from the stored tensors, by name.
        operations: the steps of the conversion; empty if the parameter is stored as it is.
        shape: of the parameter, if it is known without reading.
    """

    target: str
    sources: tuple[str, ...]
    convert_all: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    operations: tuple[Any, ...] = ()
    shape: tuple[int, ...] | None = None

    def convert(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The parameter made from the stored tensors, by name."""
        return self.convert_all(tensors)[self.target]


class MappedCheckpoint(Checkpoint):
    """Base class; a subclass sets `model`, calls `_place_`, and implements `_converted`.

    Attributes:
        model: the model of the configuration, without data.
    """

    model: PreTrainedModel
    described_in = "config.json"  # says what the model is

    def names(self) -> list[str]:
        return list(self._origins)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        first, *copies = [self._converted(origin) for origin in self._origins_of(name)]
        if any(not _same(first, copy) for copy in copies):
            aliases = " and ".join(repr(origin.target) for origin in self._origins[name])
            raise self._error(
                f"{self.described_in} ties {aliases}, but the files hold different "
                "values for them. Set tie_word_embeddings to false in config.json"
            )
        return first

    def stored_names(self, name: str) -> list[str]:
        """The stored tensors of one parameter: several if its parts (experts, projections) were
        saved separately."""
        return [stored for origin in self._origins_of(name) for stored in origin.sources]

    @property
    def origins(self) -> list[Origin]:
        """The origins of all parameters and of copies of tied ones."""
        return [origin for copies in self._origins.values() for origin in copies]

    @abstractmethod
    def _converted(self, origin: Origin) -> Tensor | QuantizedTensor:
        """A parameter, made from its stored tensors."""

    def _error(self, problem: str) -> SourceError:
        return SourceError(f"{str(self.path)!r}: {problem}")

    def _origins_of(self, name: str) -> list[Origin]:
        if name not in self._origins:
            raise self._error(
                f"{name!r} is not a parameter of {type(self.model).__name__} (tied parameters "
                "have the first of their names)"
            )
        return self._origins[name]

    def _place_(self, origins: Mapping[str, Origin], unknown: list[str]) -> None:
        """Put the origins in the model's order, under the first name of each parameter.

        Raises:
            SourceError: there are unknown stored tensors, or parameters are missing.
        """
        kind = f"{type(self.model).__name__}, which {self.described_in} describes"
        if unknown:
            raise self._error(
                f"{_listed(unknown)} in the files, but not in {kind}. Either it belongs to another "
                "model, or the model needs a newer transformers"
            )
        aliases: dict[int, list[str]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            aliases.setdefault(id(tensor), []).append(name)
        # several origins for a tied tensor if copies of it are stored
        self._origins = {
            names[0]: [origins[name] for name in names if name in origins]
            for names in aliases.values()
        }
        if missing := [name for name, copies in self._origins.items() if not copies]:
            raise self._error(
                f"{_listed(missing)} missing from the files, but needed by {kind}; download the "
                "model again"
            )


def _same(a: Tensor | QuantizedTensor, b: Tensor | QuantizedTensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor) and a.equals(b)


def _listed(names: list[str]) -> str:
    return f"{listed(map(repr, names))} {'is' if len(names) == 1 else 'are'}"
