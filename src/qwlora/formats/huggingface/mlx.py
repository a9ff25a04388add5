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
from qwlora.formats.huggingface.safetensors_files import FLOATS, SafetensorsFiles
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
    """The tensors of `files` under the float model's names (`FormatReader`)."""

    def __init__(self, files: SafetensorsFiles, settings: Mapping[str, Any]):
        self.files, self.settings = files, settings
        self._where = f"{str(files.folder)!r} (MLX)"
        names = files.names()
        layers = [name.removesuffix(".scales") for name in names if name.endswith(".scales")]
        self.layer_of = {f"{layer}.weight": layer for layer in layers}
        self._parts = {f"{layer}.{part}" for layer in layers for part in ("scales", "biases")}
        mode = settings.get("mode", "affine")
        if mode != "affine":
            raise SourceError(
                f"{self._where}: MLX mode {mode!r} is not supported, only affine, which has "
                "integers. Quantize again with mlx_lm.convert -q --q-mode affine"
            )

    def names(self) -> list[str]:
        return [name for name in self.files.names() if name not in self._parts]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.layer_of:
            return self.files.shape(name)
        _, group = self._layout(name)
        rows, groups = self.files.shape(f"{self.layer_of[name]}.scales")
        return rows, groups * group

    def read(self, name: str) -> Tensor | QuantizedTensor:
        if name not in self.layer_of:
            return self.files.read(name)
        (bitwidth, group), layer = self._layout(name), self.layer_of[name]
        scale, minimum = (
            self.files.read(f"{layer}.{part}").to(torch.float32) for part in ("scales", "biases")
        )
        codes = unpack_words(self.files.read(name), bitwidth, scale.shape[-1] * group)
        steps, negative = 2**bitwidth - 1, scale < 0
        minimum = torch.where(negative, minimum + scale * steps, minimum)
        reversed_codes = negative.repeat_interleave(group, dim=1)
        codes = torch.where(reversed_codes, steps - codes, codes)
        scheme = Scheme(bitwidth, False, PerBlock(group), float_offset=True)
        try:
            return QuantizedTensor(codes, Encoding(scheme, scale.abs(), minimum))
        except GridError as error:
            raise SourceError(f"{self._where}: {name!r}: {error}") from error

    def _layout(self, name: str) -> tuple[int, int]:
        """Bitwidth and group size of a quantized tensor.

        Raises:
            SourceError: the settings do not say them, or they do not fit the stored tensors.
        """
        layer = self.layer_of[name]
        of_layer = self.settings.get(layer)
        settings = of_layer if isinstance(of_layer, Mapping) else self.settings
        bitwidth, group = settings.get("bits"), settings.get("group_size")
        if (
            type(bitwidth) is not int
            or type(group) is not int
            or bitwidth not in MLX_BITWIDTHS
            or group < 1
        ):
            raise SourceError(
                f"{self._where}: config.json gives {layer!r} bits {bitwidth!r} and group_size "
                f"{group!r}, but MLX has {', '.join(map(str, MLX_BITWIDTHS))} bits and a whole "
                "number"
            )
        where = f"{self._where}, {bitwidth} bits in groups of {group}"
        stored = self.files.shape(name) if name in self.files else ()
        rows, words = stored if len(stored) == 2 else (0, 0)
        groups = words * 32 // bitwidth // group
        self.files.check(name, ("U32",), (rows, groups * group * bitwidth // 32), where)
        for part in ("scales", "biases"):
            self.files.check(f"{layer}.{part}", FLOATS, (rows, groups), where)
        return bitwidth, group
