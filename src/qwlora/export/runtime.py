"""Exported files, opened in the program that they were written for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from qwlora.export.proof.checks import Limits, Parity


class Runtime(ABC):
    """A model in its runtime, with exact settings.

    Attributes:
        shipped: the same with the program's own settings, if those compute something else.
        switches: whether `use` and `decode` work; else the files are of one adapter or use case.
        has_layers: whether `run_layers` works.
    """

    shipped: Runtime | None = None
    switches = False
    has_layers = False

    @property
    def has_cache(self) -> bool:
        """Whether `extend` works: keys and values of earlier tokens are inputs."""
        return False

    @property
    def call_tokens(self) -> int | None:
        """Tokens of one call, if the files have a fixed number."""
        return None

    @abstractmethod
    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        """Float32 logits [1, tokens, vocabulary] of token ids [1, tokens], none of them masked.

        Args:
            steps: the last tokens to run one by one, where the files are graphs of fixed sizes.
        """

    def use(self, adapter: Path | None) -> None:
        """Switch to the adapter in a folder, or to none. Adapters stay loaded.

        Raises:
            ExportError: the runtime refuses it.
        """
        raise NotImplementedError

    def decode(self, ids: Tensor, count: int) -> list[int]:
        """The `count` likeliest tokens after token ids [1, tokens], one by one, with a cache."""
        raise NotImplementedError

    def extend(self, ids: Tensor, past: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of new tokens, and the cache with them; an empty `past` begins a sequence."""
        raise NotImplementedError

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every output of a simulation's files by name, given every input by name."""
        raise NotImplementedError

    def run_layers(
        self, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every quantized activation in `values`, computed from the others in `values`.

        Args:
            values: the simulated value of each quantized activation.
            tensors: every input of the model by name.
        """
        raise NotImplementedError

    def layers(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        """One call on the CPU: its inputs by name, and every quantized activation by name of its
        tensor in the files.

        Args:
            tensors: inputs of the simulation, padded on the right to `call_tokens` tokens.
        """
        raise NotImplementedError

    def parity(self, reference: Mapping[str, Tensor], limits: Limits) -> Parity | None:
        """The comparison with a reference, if running `logits` is not all of it."""
        return None
