"""Exported files, opened in the program that they were written for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Runtime(Protocol):
    """A model with simulated activations."""

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every output by name, given every input by name."""

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] of token ids [batch, tokens], none of them masked."""

    def run_layers(
        self, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every quantized activation in `values`, computed from the others in `values`.

        Args:
            values: the simulated value of each quantized activation.
            tensors: every input of the model by name.
        """

    def layers(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every quantized activation of one run, by name of its tensor in the files."""


class WeightsRuntime(Protocol):
    """A base folder, with exact settings.

    Attributes:
        shipped: the same with the program's own settings, if those compute something else.
    """

    @property
    def shipped(self) -> WeightsRuntime | None: ...

    def use(self, adapter: Path | None) -> None:
        """Switch to the adapter in a folder, or to none."""

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 logits [batch, tokens, vocabulary] of token ids [batch, tokens]."""

    def decode(self, ids: Tensor, count: int) -> list[int]:
        """The `count` likeliest tokens after token ids [1, tokens], one by one, with a cache."""


class SwitchableRuntime(Runtime, WeightsRuntime, Protocol):
    """A base folder with simulated activations; every method computes with the active adapter."""

    @property
    def has_cache(self) -> bool:
        """Whether keys and values of earlier tokens are inputs."""

    def extend(self, ids: Tensor, past: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of new tokens, and the cache with them; an empty `past` begins a sequence."""
