"""Reader for GPTQ checkpoints, as AutoGPTQ and GPT-QModel write them into a Hugging Face folder.

For a layer [out, in] in groups of `g` inputs:

    qweight  int32 [in * bits / 32, out]       codes, packed along the input: each column is a
                                               little-endian bit stream
    qzeros   int32 [in / g, out * bits / 32]   zero points, packed along the output;
                                               version 1 stores `zero - 1`, version 2 `zero`
    scales   float [in / g, out]
    g_idx    int32 [in]                        the group of each input; absent in some files

    W[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o])

With activation order, the inputs of a group may be scattered. `PerBlock` needs contiguous groups,
so such a layer is refused. Contiguous groups may be numbered in any order.

For version 1, one is added to every field of a packed word, including carries into the next field,
because the writers subtract it the same way (GPT-QModel does the same). Values are computed in
float32 from the stored scales; GPT-QModel's values are identical if its scales are float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwlora.errors import SourceError
from qwlora.formats.bitwidths import GPTQ_BITWIDTHS
from qwlora.formats.huggingface_folder import FolderCheckpoint
from qwlora.formats.int32_words import blocks, quantized, unpack_words
from qwlora.formats.qweight_layers import LayerFiles
from qwlora.formats.safetensors_files import SafetensorsFiles
from qwlora.grid.quantized_tensor import QuantizedTensor

PARTS = ("qweight", "qzeros", "scales", "g_idx")
VERSIONS = {"gptq": 1, "gptq_v2": 2}
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


class GptqCheckpoint(FolderCheckpoint):
    """A folder that AutoGPTQ or GPT-QModel wrote.

    Args:
        folder: a folder with config.json and safetensors files.
        settings: the `quantization_config`, or the contents of `quantize_config.json`.

    Raises:
        SourceError: see `FolderCheckpoint`; also if the settings name another layout or bitwidth.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        super().__init__(folder, lambda files: GptqTensors(files, settings))


class GptqTensors(LayerFiles):
    """The tensors of `files` under the float model's names."""

    def __init__(self, files: SafetensorsFiles, settings: Mapping[str, Any]):
        super().__init__(files, PARTS)
        where = f"{str(files.folder)!r}, quantization_config"
        layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if settings.get("is_marlin_format"):
            layout = "marlin"
        if layout not in tuple(VERSIONS):  # a tuple, because the value may not be hashable
            raise SourceError(
                f"{where}: GPTQ layout {layout!r} is not supported; {' and '.join(VERSIONS)} are. "
                "Save the checkpoint in one of these with GPT-QModel"
            )
        self.version = VERSIONS[layout]
        self.bitwidth = settings.get("bits")
        if type(self.bitwidth) is not int or self.bitwidth not in GPTQ_BITWIDTHS:
            raise SourceError(
                f"{where}: bits is {self.bitwidth!r}, but GPTQ files have "
                f"{', '.join(map(str, GPTQ_BITWIDTHS))} bits"
            )
        self.mixed = bool(settings.get("dynamic"))  # some layers have other bitwidths
        self.from_autoround = "autoround" in json.dumps(settings, default=str).lower().replace(
            "-", ""
        ).replace("_", "")

    def shape(self, name: str) -> tuple[int, ...]:
        """`[out, in]` of a quantized layer."""
        if name not in self.layer_of:
            return self.files.shape(name)
        _, shape = self._layout(self.layer_of[name])
        return shape

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Read one tensor.

        Raises:
            SourceError: the layer's tensors do not match each other, its groups are scattered, or a
                scale or zero point is invalid.
        """
        if name not in self.layer_of:
            return self.files.read(name)
        layer = self.layer_of[name]
        where = self._where(layer)
        bitwidth, (out_features, in_features) = self._layout(layer)
        scales = self.files.read(f"{layer}.scales").to(torch.float32)
        groups = self._groups(layer, in_features, len(scales))
        codes = unpack_words(self.files.read(f"{layer}.qweight").t(), bitwidth, in_features)
        offset = -self._zeros(layer, bitwidth, out_features).to(torch.int32)
        scale, offset = scales[groups].t().contiguous(), offset[groups].t().contiguous()
        granularity = blocks(in_features, len(groups), where)
        if self.from_autoround:
            codes, scale, offset = with_positive_scales(codes, scale, offset, bitwidth)
        elif bool((scale < 0).any()):
            raise SourceError(
                f"{where}: {int((scale < 0).sum())} scales are negative, which only AutoRound "
                "writes. The file is damaged; download it again"
            )
        return quantized(codes, bitwidth, granularity, scale, offset, where)

    def _where(self, layer: str) -> str:
        return f"{str(self.files.folder)!r}: layer {layer!r} (GPTQ)"

    def _layout(self, layer: str) -> tuple[int, tuple[int, int]]:
        """Bitwidth and `[out, in]` of a layer, from the shapes of its tensors, which must be
        consistent."""
        where = self._where(layer)
        for part in ("qweight", "qzeros", "scales"):
            if f"{layer}.{part}" not in self.files:
                raise SourceError(f"{where} has no tensor {part!r}; download the model again")
        if any(self.files.dtype(f"{layer}.{part}") != "I32" for part in ("qweight", "qzeros")):
            raise SourceError(
                f"{where}: qweight and qzeros are packed in "
                f"{self.files.dtype(f'{layer}.qweight')}, but only int32 is supported"
            )
        qweight, qzeros, scales = (
            self.files.shape(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales")
        )
        if not len(qweight) == len(qzeros) == len(scales) == 2:
            raise SourceError(
                f"{where}: qweight {list(qweight)}, qzeros {list(qzeros)} and scales "
                f"{list(scales)} must be matrices"
            )
        bitwidth = self.bitwidth
        assert bitwidth is not None
        if f"{layer}.g_idx" in self.files:
            in_features = math.prod(self.files.shape(f"{layer}.g_idx"))
            fitting = [
                bits for bits in GPTQ_BITWIDTHS if qweight[0] == math.ceil(in_features * bits / 32)
            ]
            if bitwidth not in fitting and not self.mixed:
                raise SourceError(
                    f"{where}: {qweight[0]} words do not hold {in_features} codes of {bitwidth} "
                    "bits, the bitwidth in quantization_config; download the model again"
                )
            bitwidth = bitwidth if bitwidth in fitting else next(iter(fitting), 0)
        else:
            in_features = qweight[0] * 32 // bitwidth
        out_features = qweight[1]
        if (
            not bitwidth
            or scales[1] != out_features
            or qzeros != (scales[0], math.ceil(out_features * bitwidth / 32))
        ):
            raise SourceError(
                f"{where}: qweight {list(qweight)}, qzeros {list(qzeros)} and scales "
                f"{list(scales)} do not belong to one layer with {in_features} inputs; download "
                "the model again"
            )
        return bitwidth, (out_features, in_features)

    def _groups(self, layer: str, in_features: int, count: int) -> Int[Tensor, " blocks"]:
        """The group number of each block of contiguous inputs.

        Raises:
            SourceError: the inputs of a group are not contiguous.
        """
        where = self._where(layer)
        blocks(in_features, count, where)
        if f"{layer}.g_idx" not in self.files:
            return torch.arange(count)
        index = self.files.read(f"{layer}.g_idx").reshape(-1).long()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < count:
            raise SourceError(
                f"{where}: g_idx contains group {int(index.max())} or {int(index.min())}, but "
                f"there are {count} groups; download the model again"
            )
        runs = index.view(count, -1)
        if not bool((runs == runs[:, :1]).all()):
            raise SourceError(
                f"{where} was quantized in activation order (desc_act), so the inputs of a group "
                "are scattered, which blocks cannot express. "
                "Quantize the float model again with desc_act=False, or with act_group_aware=True "
                "in GPT-QModel"
            )
        return runs[:, 0]

    def _zeros(self, layer: str, bitwidth: int, out_features: int) -> Tensor:
        words = self.files.read(f"{layer}.qzeros")
        if self.version == 2:
            return unpack_words(words, bitwidth, out_features)
        if bitwidth in ONES:
            return unpack_words(words + ONES[bitwidth], bitwidth, out_features)
        return (unpack_words(words, bitwidth, out_features) + 1) & (2**bitwidth - 1)


def with_positive_scales(
    codes: Tensor,
    scale: Float[Tensor, "out groups"],
    offset: Int[Tensor, "out groups"],
    bitwidth: int,
) -> tuple[Tensor, Float[Tensor, "out groups"], Int[Tensor, "out groups"]]:
    """Make negative scales positive without changing the values; AutoRound writes negative scales.

    With `steps = 2^bitwidth - 1`, a block with a negative scale becomes

        code' = steps - code,    scale' = -scale,    offset' = -steps - offset
    """
    negative, steps = scale < 0, 2**bitwidth - 1
    flipped = negative.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    return (
        torch.where(flipped, steps - codes, codes),
        scale.abs(),
        torch.where(negative, -steps - offset, offset),
    )
