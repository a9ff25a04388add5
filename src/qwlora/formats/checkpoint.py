"""What every reader of a model's files gives: tensors by their Hugging Face parameter names, one at a time, as integers where the file holds integers.

A reader maps its file and reads a tensor when asked, so that the whole model is never in memory as floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from transformers import PretrainedConfig

from qwlora.grid.quantized_tensor import QuantizedTensor


class Checkpoint(Protocol):
    """Files of one model.

    `config` is the Hugging Face configuration without any `quantization_config`; `names` are parameter names of the model that the configuration builds
    (`model.layers.0.mlp.down_proj.weight`), a tied tensor once.
    """

    config: PretrainedConfig

    def names(self) -> Sequence[str]:
        """Names of all tensors, in the order in which a forward pass uses them where that is known."""
        ...

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """One tensor; integers if the file holds integers for it.

        Raises:
            SourceError: the tensor cannot be read, or is stored in a way that no grid expresses; the message names it and the format.
        """
        ...
