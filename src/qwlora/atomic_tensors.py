"""A safetensors file that is there whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from qwlora.durable import move_into_place


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `file`, in the place of what was there, and the folder that it is in.

    Raises:
        SafetensorError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.part")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata=metadata
    )
    move_into_place(scratch, file)
