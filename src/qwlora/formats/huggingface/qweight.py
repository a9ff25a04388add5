"""Readers for GPTQ and AWQ checkpoints in a Hugging Face folder: integers in int32 words.

Both store a layer [out, in] in groups of `g` inputs as three tensors, with these axes; words hold
the axis with a star, as a little-endian bit stream:

    layout  writers                   qweight         qzeros            scales
    gptq    AutoGPTQ, GPT-QModel      [in*, out]      [groups, out*]    [groups, out]
    gemm    AutoAWQ                   [in, out*]      [groups, out*]    [groups, out]
    gemv    AutoAWQ                   [out, in*]      [out, groups*]    [out, groups]

    W[o, i] = scales[o, group(i)] * (code[o, i] - zero[o, group(i)])

GPTQ has 2, 3, 4 or 8 bits. `g_idx` int32 [in] is the group of each input, if it is stored. With
activation order, the inputs of a group may be scattered; `PerBlock` needs contiguous groups, so
such a layer is refused. Contiguous groups may be numbered in any order. Version 1 stores
`zero - 1`, version 2 `zero`. For version 1, one is added to every field of a packed word, including
carries into the next field, because the writers subtract it the same way (as does GPT-QModel).

AWQ has 4 bits and groups in order. In `gemm`, nibble `n` of a word belongs to column
`(0, 2, 4, 6, 1, 3, 5, 7)[n]` of its eight. In `gemv`, the groups are padded to whole words.

Values are computed in float32 from the stored scales; those of GPT-QModel and AutoAWQ are
identical if their scales are float32.
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
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
from qwlora.formats.huggingface.int32_words import blocks, quantized, unpack_words
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.grid.quantized_tensor import QuantizedTensor

PARTS = ("qweight", "qzeros", "scales")
AXES = {
    "gptq": (("in*", "out"), ("groups", "out*"), ("groups", "out")),
    "gemm": (("in", "out*"), ("groups", "out*"), ("groups", "out")),
    "gemv": (("out", "in*"), ("out", "groups*"), ("out", "groups")),
}
NIBBLE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]
GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}
GPTQ_BITWIDTHS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # one in every field of a word


class QweightCheckpoint(FolderCheckpoint):
    """A folder that AutoGPTQ, GPT-QModel or AutoAWQ wrote.

    Args:
        folder: a folder with config.json and safetensors files.
        settings: the `quantization_config`, or the contents of the older `quantize_config.json`
            (GPTQ) or `quant_config.json` (AWQ).
        method: `gptq` or `awq`.

    Raises:
        SourceError: see `FolderCheckpoint`; also if the settings name another layout or bitwidth.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], method: str):
        kind = {"gptq": GptqTensors, "awq": AwqTensors}[method]
        super().__init__(folder, lambda files: kind(files, settings))


class _QweightTensors:
    """The tensors of `files` under the float model's names."""

    layout: str
    label: str

    def __init__(self, files: SafetensorsFiles):
        self.files = files
        self.layer_of = {
            f"{name.removesuffix('.qweight')}.weight": name.removesuffix(".qweight")
            for name in files.names()
            if name.endswith(".qweight")
        }

    def names(self) -> list[str]:
        """Names of the float model's tensors."""
        parts = {
            f"{layer}.{part}" for layer in self.layer_of.values() for part in (*PARTS, "g_idx")
        }
        return [*self.layer_of, *(name for name in self.files.names() if name not in parts)]

    def shape(self, name: str) -> tuple[int, ...]:
        """`[out, in]` of a quantized layer."""
        if name not in self.layer_of:
            return self.files.shape(name)
        _, sizes = self._checked(self.layer_of[name])
        return sizes["out"], sizes["in"]

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Read one tensor.

        Raises:
            SourceError: the layer's tensors do not match each other, its groups are scattered, or a
                scale or zero point is invalid.
        """
        if name not in self.layer_of:
            return self.files.read(name)
        layer = self.layer_of[name]
        bitwidth, sizes = self._checked(layer)
        codes, zeros, scale = (self._part(layer, part, bitwidth, sizes) for part in PARTS)
        scale = scale[:, : sizes["groups"]]  # without the padding of gemv
        codes, scale, offset = self._in_order(layer, codes, scale, -zeros.to(torch.int32))
        where = self.where(layer)
        granularity = blocks(sizes["in"], sizes["groups"], where)
        return quantized(codes, bitwidth, granularity, scale, offset, where)

    def where(self, layer: str) -> str:
        return f"{str(self.files.folder)!r}: layer {layer!r} ({self.label})"

    def _part(self, layer: str, part: str, bitwidth: int, sizes: Mapping[str, int]) -> Tensor:
        """Codes, zero points or scales as [out, in or groups]."""
        values = self.files.read(f"{layer}.{part}")
        first, second = AXES[self.layout][PARTS.index(part)]
        if first.endswith("*"):
            first, second, values = second, first, values.t()
        if second.endswith("*"):
            values = self._unpacked(part, values, bitwidth, sizes[second.rstrip("*")])
        if first != "out":
            values = values.t()
        return values.to(torch.float32) if part == "scales" else values

    def _unpacked(self, part: str, words: Tensor, bitwidth: int, count: int) -> Tensor:
        """The fields of each row of words."""
        return unpack_words(words, bitwidth, count)

    def _in_order(
        self, layer: str, codes: Tensor, scale: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and offsets with one column of scales per block of inputs, in order."""
        return codes, scale, offset

    def _sizes(
        self, layer: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, dict[str, int]]:
        """Bitwidth, and the sizes `out`, `in` and `groups`, from shapes of matrices."""
        raise NotImplementedError

    def _checked(self, layer: str) -> tuple[int, dict[str, int]]:
        """As `_sizes`, after checking that types and shapes of the tensors agree.

        Raises:
            SourceError: they do not.
        """
        where = self.where(layer)
        for part in PARTS:
            if f"{layer}.{part}" not in self.files:
                raise SourceError(f"{where} has no tensor {part!r}; download the model again")
            dtype = self.files.dtype(f"{layer}.{part}")
            if part != "scales" and dtype != "I32":
                raise SourceError(f"{where}: {part} is packed in {dtype}, but only in int32 words")
        shapes = {part: self.files.shape(f"{layer}.{part}") for part in PARTS}
        stored = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
        if any(len(shape) != 2 for shape in shapes.values()):
            raise SourceError(f"{where}: {stored} must be matrices")
        bitwidth, sizes = self._sizes(layer, shapes)
        for axes, shape in zip(AXES[self.layout], shapes.values(), strict=True):
            for axis, size in zip(axes, shape, strict=True):
                needed = sizes[axis.rstrip("*")]
                needed = math.ceil(needed * bitwidth / 32) if axis.endswith("*") else needed
                padded = self.layout == "gemv" and axis.startswith("groups")
                if size < needed or (size > needed and not padded):
                    raise SourceError(
                        f"{where}: {stored} do not belong to one layer with {sizes['in']} inputs "
                        f"in {sizes['groups']} groups; download the model again"
                    )
        return bitwidth, sizes


class GptqTensors(_QweightTensors):
    """The tensors of a GPTQ folder under the float model's names."""

    layout, label = "gptq", "GPTQ"

    def __init__(self, files: SafetensorsFiles, settings: Mapping[str, Any]):
        super().__init__(files)
        where = f"{str(files.folder)!r}, quantization_config"
        layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if settings.get("is_marlin_format"):
            layout = "marlin"
        if layout not in tuple(GPTQ_VERSIONS):  # a tuple: the value may not be hashable
            raise SourceError(
                f"{where}: GPTQ layout {layout!r} is not supported; {' and '.join(GPTQ_VERSIONS)} "
                "are. Save the checkpoint in one of these with GPT-QModel"
            )
        bitwidth = settings.get("bits")
        if type(bitwidth) is not int or bitwidth not in GPTQ_BITWIDTHS:
            raise SourceError(
                f"{where}: bits is {bitwidth!r}, but GPTQ files have "
                f"{', '.join(map(str, GPTQ_BITWIDTHS))} bits"
            )
        self.version, self.bitwidth = GPTQ_VERSIONS[layout], bitwidth
        self.mixed = bool(settings.get("dynamic"))  # some layers have other bitwidths
        text = json.dumps(settings, default=str).lower().replace("-", "").replace("_", "")
        self.from_autoround = "autoround" in text

    def _sizes(
        self, layer: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, dict[str, int]]:
        words, bitwidth = shapes["qweight"][0], self.bitwidth
        inputs = words * 32 // bitwidth
        if f"{layer}.g_idx" in self.files:
            inputs = math.prod(self.files.shape(f"{layer}.g_idx"))
            fitting = [bits for bits in GPTQ_BITWIDTHS if words == math.ceil(inputs * bits / 32)]
            if bitwidth not in fitting and not (self.mixed and fitting):
                raise SourceError(
                    f"{self.where(layer)}: {words} words do not hold {inputs} codes of {bitwidth} "
                    "bits, the bitwidth in quantization_config; download the model again"
                )
            bitwidth = bitwidth if bitwidth in fitting else fitting[0]
        return bitwidth, {
            "in": inputs,
            "out": shapes["qweight"][1],
            "groups": shapes["scales"][0],
        }

    def _unpacked(self, part: str, words: Tensor, bitwidth: int, count: int) -> Tensor:
        if part != "qzeros" or self.version == 2:
            return unpack_words(words, bitwidth, count)
        if bitwidth in _ONES:
            return unpack_words(words + _ONES[bitwidth], bitwidth, count)
        return (unpack_words(words, bitwidth, count) + 1) & (2**bitwidth - 1)

    def _in_order(
        self, layer: str, codes: Tensor, scale: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        where = self.where(layer)
        if f"{layer}.g_idx" in self.files:
            groups = self._groups(layer, codes.shape[1], scale.shape[1])
            scale, offset = scale[:, groups], offset[:, groups]
        negative = scale < 0
        if self.from_autoround:
            return with_positive_scales(codes, scale, offset, self._checked(layer)[0])
        if bool(negative.any()):
            raise SourceError(
                f"{where}: {int(negative.sum())} scales are negative, which only AutoRound "
                "writes. The file is damaged; download it again"
            )
        return codes, scale, offset

    def _groups(self, layer: str, inputs: int, count: int) -> Int[Tensor, " blocks"]:
        """The group number of each block of contiguous inputs.

        Raises:
            SourceError: the inputs of a group are not contiguous.
        """
        where = self.where(layer)
        blocks(inputs, count, where)
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


class AwqTensors(_QweightTensors):
    """The tensors of an AWQ folder under the float model's names."""

    label = "AWQ"

    def __init__(self, files: SafetensorsFiles, settings: Mapping[str, Any]):
        super().__init__(files)
        where = f"{str(files.folder)!r}, quantization_config"
        self.layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if self.layout not in ("gemm", "gemv"):
            raise SourceError(
                f"{where}: AWQ layout {self.layout!r} is not supported; gemm and gemv are. Save "
                "the checkpoint with version='GEMM'"
            )
        bitwidth = settings.get("bits", settings.get("w_bit"))
        if bitwidth != 4:
            raise SourceError(
                f"{where}: bits is {bitwidth!r}, but AWQ files have 4 bits; quantize the float "
                "model instead"
            )
        self.group_size = settings.get("group_size", settings.get("q_group_size"))
        if type(self.group_size) is not int or not (self.group_size > 0 or self.group_size == -1):
            raise SourceError(
                f"{where}: group_size is {self.group_size!r}, but must be a positive integer, or "
                "-1 for whole rows"
            )

    def _sizes(
        self, layer: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, dict[str, int]]:
        rows, words = shapes["qweight"]
        inputs, outputs = (rows, words * 8) if self.layout == "gemm" else (words * 8, rows)
        group = inputs if self.group_size == -1 else self.group_size
        if inputs % group:
            raise SourceError(
                f"{self.where(layer)}: groups of {group} do not divide {inputs} inputs; download "
                "the model again"
            )
        return 4, {"in": inputs, "out": outputs, "groups": inputs // group}

    def _unpacked(self, part: str, words: Tensor, bitwidth: int, count: int) -> Tensor:
        values = unpack_words(words, bitwidth, count)
        if self.layout == "gemm":
            values = values.unflatten(1, (-1, 8))[:, :, NIBBLE_OF_COLUMN].flatten(1)
        return values


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
