"""Reader for affine-quantized MLX folders, as mlx-lm writes them (`mlx_lm.convert -q`).

config.json has a `quantization` section: `group_size`, `bits`, and, under the name of a module that
differs, its own `group_size` and `bits`, or false if it stays float. For a Linear or Embedding
[out, in]:

    weight   uint32 [out, in * bits / 32]   codes; each row is a little-endian bit stream
    scales   float [out, in / group_size]   may be negative
    biases   float [out, in / group_size]   the value of code 0; not the layer's own bias

    W[o, i] = scales[o, g] * code[o, i] + biases[o, g],   g = i // group_size

Codes of a group with a negative scale are counted from the other end, which changes no value but by
the rounding of one float32 addition:

    code' = 2^bits - 1 - code,   scale' = -scale,   bias' = bias + scale * (2^bits - 1)

Source: `mlx.core.quantize` and `mlx_lm.utils` of mlx 0.32 and mlx-lm 0.32. Modes other than
`affine` (mxfp4, nvfp4, mxfp8) have no integers and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwlora.errors import GridError, SourceError
from qwlora.formats.bitwidths import MLX_BITWIDTHS
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
from qwlora.formats.huggingface.int32_words import unpack_words
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.grid.encoding import Encoding
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import PerBlock, Scheme


class MlxCheckpoint(FolderCheckpoint):
    """A folder that mlx-lm quantized.

    Args:
        folder: a folder with config.json and safetensors files.
        settings: the `quantization` section of config.json.

    Raises:
        SourceError: see `FolderCheckpoint`; also if the mode is not affine, or a group size or
            bitwidth does not fit its tensors.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        super().__init__(folder, lambda files: MlxTensors(files, settings))


class MlxTensors:
    """The tensors of `files` under the float model's names."""

    def __init__(self, files: SafetensorsFiles, settings: Mapping[str, Any]):
        self.files = files
        self.settings = settings
        names = files.names()
        known = set(names)
        self.quantized = {
            name
            for name in names
            if name.endswith(".weight") and name.replace(".weight", ".scales") in known
        }
        parts = {
            f"{name.removesuffix('.weight')}.{part}"
            for name in self.quantized
            for part in ("scales", "biases")
        }
        self.kept = [name for name in names if name not in parts]
        mode = settings.get("mode", "affine")
        if mode != "affine":
            raise SourceError(
                f"{self._where}: MLX mode {mode!r} is not supported, only affine, which has "
                "integers. Quantize again with mlx_lm.convert -q --q-mode affine"
            )

    @property
    def _where(self) -> str:
        return f"{str(self.files.folder)!r} (MLX)"

    def names(self) -> list[str]:
        """Names of the float model's tensors."""
        return self.kept

    def shape(self, name: str) -> tuple[int, ...]:
        """`[out, in]` of a quantized layer."""
        shape = self.files.shape(name)
        if name not in self.quantized:
            return shape
        bitwidth, _ = self._layout(name)
        return (*shape[:-1], shape[-1] * 32 // bitwidth)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Read one tensor.

        Raises:
            SourceError: the tensors of a layer do not fit each other or its settings.
        """
        if name not in self.quantized:
            return self.files.read(name)
        bitwidth, group = self._layout(name)
        scale = self.files.read(_part(name, "scales")).to(torch.float32)
        minimum = self.files.read(_part(name, "biases")).to(torch.float32)
        codes = unpack_words(self.files.read(name), bitwidth, scale.shape[-1] * group)
        steps, negative = 2**bitwidth - 1, scale < 0
        flipped = negative.repeat_interleave(group, dim=1)
        scheme = Scheme(bitwidth, False, PerBlock(group), float_offset=True)
        try:
            encoding = Encoding(
                scheme, scale.abs(), torch.where(negative, minimum + scale * steps, minimum)
            )
        except GridError as error:
            raise SourceError(f"{self._where}: {name!r}: {error}") from error
        return QuantizedTensor(torch.where(flipped, steps - codes, codes), encoding)

    def _layout(self, name: str) -> tuple[int, int]:
        """Bitwidth and group size of a quantized tensor.

        Raises:
            SourceError: the settings do not say them, or they do not fit the stored tensors.
        """
        module = name.removesuffix(".weight")
        own = self.settings.get(module)
        settings = own if isinstance(own, Mapping) else self.settings
        bitwidth, group = settings.get("bits"), settings.get("group_size")
        if type(bitwidth) is not int or type(group) is not int or bitwidth not in MLX_BITWIDTHS:
            raise SourceError(
                f"{self._where}: config.json gives {module!r} bits {bitwidth!r} and group_size "
                f"{group!r}, but MLX has {', '.join(map(str, MLX_BITWIDTHS))} bits and a whole "
                "number"
            )
        stored = self.files.shape(name)
        scales = self.files.shape(_part(name, "scales"))
        if _part(name, "biases") not in self.files:
            raise SourceError(
                f"{self._where} has no tensor {_part(name, 'biases')!r}; download the model again"
            )
        biases = self.files.shape(_part(name, "biases"))
        fits = (
            self.files.dtype(name) == "U32"
            and len(stored) == 2
            and scales == biases == (stored[0], stored[1] * 32 // bitwidth // max(group, 1))
            and scales[1] * group * bitwidth == stored[1] * 32
        )
        if not fits:
            raise SourceError(
                f"{self._where}: {name!r} is {self.files.dtype(name)} {list(stored)}, its scales "
                f"{list(scales)} and biases {list(biases)}; these do not fit {bitwidth} bits in "
                f"groups of {group}. Download the model again"
            )
        return bitwidth, group


def _part(name: str, part: str) -> str:
    return f"{name.removesuffix('.weight')}.{part}"
