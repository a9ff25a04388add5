"""GPTQ checkpoints: the layout of AutoGPTQ and GPT-QModel in a Hugging Face folder.

For a layer [out, in] in groups of `g` inputs:

    qweight  int32 [in * bits / 32, out]       codes, packed along the input, a little-endian bit stream down each column
    qzeros   int32 [in / g, out * bits / 32]   zero points, packed along the output; version 1 stores `zero - 1`, version 2 `zero`
    scales   float [in / g, out]
    g_idx    int32 [in]                        the group of each input; absent in some files

    W[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o])

With activation order the groups may be scattered over the inputs; a grid's blocks are neighbours, so such a layer is refused. Where whole runs of `g` inputs
share a group, whatever its number, the grid says the same.

Version 1's zero points are restored as GPT-QModel does, which adds one in every field of the packed word, carries included: its writers subtract the same way.
Computed in float32 from the stored scales; GPT-QModel's own numbers are these when its scales are float32.
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
from qwlora.formats.huggingface_folder import FolderCheckpoint
from qwlora.formats.int32_words import blocks, quantized, unpack_words
from qwlora.formats.qweight_layers import LayerFiles
from qwlora.formats.safetensors_files import SafetensorsFiles
from qwlora.grid.quantized_tensor import QuantizedTensor

BITWIDTHS = (2, 3, 4, 8)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
VERSIONS = {"gptq": 1, "gptq_v2": 2}
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


class GptqCheckpoint(FolderCheckpoint):
    """A folder that AutoGPTQ or GPT-QModel wrote.

    Args:
        folder: config.json and safetensors files.
        settings: the `quantization_config`, or the contents of `quantize_config.json`.

    Raises:
        SourceError: as `FolderCheckpoint`; or the settings ask for a layout that is not the one above.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        super().__init__(folder, lambda files: GptqTensors(files, settings))


class GptqTensors(LayerFiles):
    """Tensors of `files` under the float model's names."""

    def __init__(self, files: SafetensorsFiles, settings: Mapping[str, Any]):
        super().__init__(files, PARTS)
        where = f"{str(files.folder)!r}, quantization_config"
        layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if settings.get("is_marlin_format"):
            layout = "marlin"
        if layout not in tuple(VERSIONS):  # what a file says need not be hashable
            raise SourceError(
                f"{where}: GPTQ layout {layout!r} is not read; {' and '.join(VERSIONS)} are. Save the checkpoint in one of these with GPT-QModel"
            )
        self.version = VERSIONS[layout]
        self.bitwidth = settings.get("bits")
        if type(self.bitwidth) is not int or self.bitwidth not in BITWIDTHS:
            raise SourceError(
                f"{where}: bits is {self.bitwidth!r}; GPTQ has {', '.join(map(str, BITWIDTHS))}"
            )
        self.mixed = bool(settings.get("dynamic"))  # layers of other bitwidths
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
        """One tensor.

        Raises:
            SourceError: the layer's tensors do not fit each other, its groups are scattered, or a number is impossible.
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
            codes, scale, offset = read_backwards(codes, scale, offset, bitwidth)
        elif bool((scale < 0).any()):
            raise SourceError(
                f"{where}: {int((scale < 0).sum())} scales are negative, which only AutoRound's files may have; the file is damaged"
            )
        return quantized(codes, bitwidth, granularity, scale, offset, where)

    def _where(self, layer: str) -> str:
        return f"{str(self.files.folder)!r}: layer {layer!r} (GPTQ)"

    def _layout(self, layer: str) -> tuple[int, tuple[int, int]]:
        """Bitwidth and `[out, in]`, from the shapes; checked against each other."""
        where = self._where(layer)
        for part in ("qweight", "qzeros", "scales"):
            if f"{layer}.{part}" not in self.files:
                raise SourceError(f"{where} has no tensor {part!r}; download the model again")
        if any(self.files.dtype(f"{layer}.{part}") != "I32" for part in ("qweight", "qzeros")):
            raise SourceError(
                f"{where}: qweight and qzeros are packed in {self.files.dtype(f'{layer}.qweight')}; only words of int32 are read"
            )
        qweight, qzeros, scales = (
            self.files.shape(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales")
        )
        if not len(qweight) == len(qzeros) == len(scales) == 2:
            raise SourceError(
                f"{where}: qweight {list(qweight)}, qzeros {list(qzeros)} and scales {list(scales)} must be matrices"
            )
        bitwidth = self.bitwidth
        assert bitwidth is not None
        if f"{layer}.g_idx" in self.files:
            in_features = math.prod(self.files.shape(f"{layer}.g_idx"))
            fitting = [
                bits for bits in BITWIDTHS if qweight[0] == math.ceil(in_features * bits / 32)
            ]
            if bitwidth not in fitting and not self.mixed:
                raise SourceError(
                    f"{where}: {qweight[0]} words do not hold {in_features} codes of {bitwidth} bits, which quantization_config says"
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
                f"{where}: qweight {list(qweight)}, qzeros {list(qzeros)} and scales {list(scales)} do not belong to one layer of {in_features} inputs"
            )
        return bitwidth, (out_features, in_features)

    def _groups(self, layer: str, in_features: int, count: int) -> Int[Tensor, " blocks"]:
        """The group of each run of neighbouring inputs.

        Raises:
            SourceError: the inputs of a group are not neighbours.
        """
        where = self._where(layer)
        blocks(in_features, count, where)
        if f"{layer}.g_idx" not in self.files:
            return torch.arange(count)
        index = self.files.read(f"{layer}.g_idx").reshape(-1).long()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < count:
            raise SourceError(
                f"{where}: g_idx names group {int(index.max())} or {int(index.min())}, but there are {count}"
            )
        runs = index.view(count, -1)
        if not bool((runs == runs[:, :1]).all()):
            raise SourceError(
                f"{where} was quantized in activation order (desc_act) with scattered groups: its g_idx gives neighbouring inputs different scales, "
                "which blocks cannot express. Quantize the float model again with desc_act=False, or with act_group_aware=True in GPT-QModel"
            )
        return runs[:, 0]

    def _zeros(self, layer: str, bitwidth: int, out_features: int) -> Tensor:
        words = self.files.read(f"{layer}.qzeros")
        if self.version == 2:
            return unpack_words(words, bitwidth, out_features)
        if bitwidth in ONES:
            return unpack_words(words + ONES[bitwidth], bitwidth, out_features)
        return (unpack_words(words, bitwidth, out_features) + 1) & (2**bitwidth - 1)


def read_backwards(
    codes: Tensor,
    scale: Float[Tensor, "out groups"],
    offset: Int[Tensor, "out groups"],
    bitwidth: int,
) -> tuple[Tensor, Float[Tensor, "out groups"], Int[Tensor, "out groups"]]:
    """The same values where a scale is negative (AutoRound writes such): `q' = steps - q`, `scale' = -scale`, `offset' = -steps - offset`."""
    negative, steps = scale < 0, 2**bitwidth - 1
    flipped = negative.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    return (
        torch.where(flipped, steps - codes, codes),
        scale.abs(),
        torch.where(negative, -steps - offset, offset),
    )
