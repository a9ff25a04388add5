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
from typing import Any

import torch

from qwlora.errors import GridError, SourceError
from qwlora.formats.bitwidths import MLX_BITWIDTHS
from qwlora.formats.huggingface.huggingface_folder import FormatReader
from qwlora.formats.huggingface.int32_words import unpack_words
from qwlora.formats.huggingface.safetensors_files import FLOATS, SafetensorsFiles
from qwlora.grid.encoding import Encoding, QuantizedTensor
from qwlora.grid.scheme import PerBlock, Scheme


class MlxTensors(FormatReader):
    """The tensors of `files`; `settings` is the `quantization` section of config.json.

    Raises:
        SourceError: the mode is not affine.
    """

    label, parts = "MLX", ("weight", "scales", "biases")

    def __init__(self, files: SafetensorsFiles, settings: Mapping[str, Any]):
        super().__init__(files)
        self.settings = settings
        layers = [n.removesuffix(".scales") for n in files.names() if n.endswith(".scales")]
        self.layer_of = {f"{layer}.weight": layer for layer in layers}
        if (mode := settings.get("mode", "affine")) != "affine":
            raise SourceError(
                f"{str(files.folder)!r}: MLX mode {mode!r} is not supported, only affine, which "
                "has integers. Quantize again with mlx_lm.convert -q --q-mode affine"
            )

    def layer_shape(self, layer: str) -> tuple[int, ...]:
        _, group = self._layout(layer)
        rows, groups = self.files.shape(f"{layer}.scales")
        return rows, groups * group

    def read_layer(self, layer: str) -> QuantizedTensor:
        bitwidth, group = self._layout(layer)
        words, scale, minimum = (self.files.read(f"{layer}.{part}") for part in self.parts)
        scale, minimum = scale.to(torch.float32), minimum.to(torch.float32)
        codes = unpack_words(words, bitwidth, scale.shape[-1] * group)
        steps, negative = 2**bitwidth - 1, scale < 0
        minimum = torch.where(negative, minimum + scale * steps, minimum)
        reversed_codes = negative.repeat_interleave(group, dim=1)
        codes = torch.where(reversed_codes, steps - codes, codes)
        scheme = Scheme(bitwidth, False, PerBlock(group), float_offset=True)
        try:
            return QuantizedTensor(codes, Encoding(scheme, scale.abs(), minimum))
        except GridError as error:
            raise SourceError(f"{self.where(layer)}: {error}") from error

    def _layout(self, layer: str) -> tuple[int, int]:
        """Bitwidth and group size of a layer, after checking that its tensors fit them."""
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
                f"{self.where(layer)}: config.json gives it bits {bitwidth!r} and group_size "
                f"{group!r}, but MLX has {', '.join(map(str, MLX_BITWIDTHS))} bits and a whole "
                "number"
            )
        where = f"{self.where(layer)}, {bitwidth} bits in groups of {group}"
        weight = f"{layer}.weight"
        stored = self.files.shape(weight) if weight in self.files else ()
        rows, words = stored if len(stored) == 2 else (0, 0)
        groups = words * 32 // bitwidth // group
        self.files.check(weight, ("U32",), (rows, groups * group * bitwidth // 32), where)
        for part in ("scales", "biases"):
            self.files.check(f"{layer}.{part}", FLOATS, (rows, groups), where)
        return bitwidth, group
