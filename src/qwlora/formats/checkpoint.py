"""The base class of all checkpoint readers: tensors by Hugging Face parameter name, one at a time.

A tensor that is stored as integers is read as a `QuantizedTensor`, any other as a float tensor. A
reader loads a tensor only when it is asked for, so the whole model is never in memory as floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig

from qwlora.grid.quantized_tensor import QuantizedTensor


class Checkpoint:
    """The stored tensors of one model.

    Attributes:
        config: the Hugging Face configuration, without its `quantization_config`.
        path: the file, or the folder of the files, which may also hold a generation_config.json.
    """

    config: PretrainedConfig
    path: Path

    def names(self) -> Sequence[str]:
        """Parameter names of the model that `config` builds
        (`model.layers.0.mlp.down_proj.weight`), tied tensors once, in the model's order if that is
        known."""
        raise NotImplementedError

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Read one tensor, as integers `[out, in]` if it is stored as integers.

        Raises:
            SourceError: the tensor cannot be read, or no `Encoding` can express how it is stored.
                The message names the tensor and the format.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        kind, model, count = type(self).__name__, self.config.model_type, len(self.names())
        return f"{kind} of {model} with {count} tensors in {str(self.path)!r}"
