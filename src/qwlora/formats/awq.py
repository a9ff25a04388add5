"""Reader for AWQ checkpoints: AutoAWQ's 4-bit layouts `gemm` and `gemv` in a Hugging Face folder.

    gemm    qweight int32 [in, out / 8]   qzeros int32 [in / g, out / 8]        scales [in / g, out]
    gemv    qweight int32 [out, in / 8]   qzeros int32 [out, padded groups / 8] scales [out, padded
    groups]

    W[o, i] = scales[group(i), o] * (code[i, o] - zero[group(i), o])

A word holds eight codes: nibble `n` belongs to column `(0, 2, 4, 6, 1, 3, 5, 7)[n]` of the eight in
`gemm`, and to column `n` in `gemv`. A group is `g` contiguous inputs. Values are computed in
float32 from the stored scales; AutoAWQ's values are identical if its scales are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from qwlora.errors import SourceError
from qwlora.formats.huggingface_folder import FolderCheckpoint
from qwlora.formats.int32_words import blocks, quantized, unpack_words
from qwlora.formats.qweight_layers import LayerFiles
from qwlora.formats.safetensors_files import SafetensorsFiles
from qwlora.grid.quantized_tensor import QuantizedTensor

BITWIDTH = 4
PARTS = ("qweight", "qzeros", "scales")
NIBBLE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]


class AwqCheckpoint(FolderCheckpoint):
    """A folder that AutoAWQ wrote.

    Args:
        folder: a folder with config.json and safetensors files.
        settings: the `quantization_config`, or the contents of `quant_config.json`.

    Raises:
        SourceError: see `FolderCheckpoint`; also if the settings name another layout or bitwidth.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        super().__init__(folder, lambda files: AwqTensors(files, settings))


class AwqTensors(LayerFiles):
    """The tensors of `files` under the float model's names."""

    def __init__(self, files: SafetensorsFiles, settings: Mapping[str, Any]):
        super().__init__(files, PARTS)
        where = f"{str(files.folder)!r}, quantization_config"
        layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if layout not in ("gemm", "gemv"):
            raise SourceError(
                f"{where}: AWQ layout {layout!r} is not supported; gemm and gemv are. Save the "
                "checkpoint with version='GEMM'"
            )
        bitwidth = settings.get("bits", settings.get("w_bit"))
        if bitwidth != BITWIDTH:
            raise SourceError(
                f"{where}: bits is {bitwidth!r}, but AWQ files have {BITWIDTH} bits; quantize the "
                "float model instead"
            )
        self.by_input = layout == "gemm"
        self.group_size = settings.get("group_size", settings.get("q_group_size"))
        if type(self.group_size) is not int or not (self.group_size > 0 or self.group_size == -1):
            raise SourceError(
                f"{where}: group_size is {self.group_size!r}, but must be a positive integer, or "
                "-1 for whole rows"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """`[out, in]` of a quantized layer."""
        return (
            self._layout(self.layer_of[name]) if name in self.layer_of else self.files.shape(name)
        )

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Read one tensor.

        Raises:
            SourceError: the layer's tensors do not match each other, or a scale or zero point is
                invalid.
        """
        if name not in self.layer_of:
            return self.files.read(name)
        layer = self.layer_of[name]
        out_features, in_features = self._layout(layer)
        qweight, qzeros, scale = (self.files.read(f"{layer}.{part}") for part in PARTS)
        groups = self._group_count(in_features)
        if self.by_input:
            codes, zeros, scale = (
                _columns(qweight, out_features).t(),
                _columns(qzeros, out_features).t(),
                scale.t(),
            )
        else:
            codes, zeros, scale = (
                unpack_words(qweight, BITWIDTH, in_features),
                unpack_words(qzeros, BITWIDTH, groups),
                scale[:, :groups],
            )
        where = self._where(layer)
        return quantized(
            codes,
            BITWIDTH,
            blocks(in_features, groups, where),
            scale,
            -zeros.to(torch.int32),
            where,
        )

    def _where(self, layer: str) -> str:
        return f"{str(self.files.folder)!r}: layer {layer!r} (AWQ)"

    def _group_count(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else in_features // self.group_size

    def _layout(self, layer: str) -> tuple[int, int]:
        """`[out, in]` of a layer, from the shapes of its tensors, which must be consistent."""
        where = self._where(layer)
        for part in PARTS:
            if f"{layer}.{part}" not in self.files:
                raise SourceError(
                    f"{where} has no tensor {part!r}; AutoAWQ always writes it. Download the model "
                    "again"
                )
        if any(self.files.dtype(f"{layer}.{part}") != "I32" for part in ("qweight", "qzeros")):
            raise SourceError(
                f"{where}: qweight and qzeros are packed in "
                f"{self.files.dtype(f'{layer}.qweight')}, but only int32 is supported"
            )
        qweight, qzeros, scales = (self.files.shape(f"{layer}.{part}") for part in PARTS)
        if not len(qweight) == len(qzeros) == len(scales) == 2:
            raise SourceError(
                f"{where}: qweight {list(qweight)}, qzeros {list(qzeros)} and scales "
                f"{list(scales)} must be matrices"
            )
        out_features, in_features = (
            (qweight[1] * 8, qweight[0]) if self.by_input else (qweight[0], qweight[1] * 8)
        )
        groups = self._group_count(in_features)
        if self.by_input:
            fits = qzeros == (groups, out_features // 8) and scales == (groups, out_features)
        else:
            fits = qzeros[0] == scales[0] == out_features and scales[1] == 8 * qzeros[1] >= groups
        if not fits or (self.group_size != -1 and in_features % self.group_size):
            raise SourceError(
                f"{where}: qweight {list(qweight)}, qzeros {list(qzeros)} and scales "
                f"{list(scales)} do not belong to one layer in groups of {self.group_size}; "
                "download the model again"
            )
        return out_features, in_features


def _columns(words: Int[Tensor, "rows words"], count: int) -> UInt8[Tensor, "rows count"]:
    """Unpack `gemm` words into codes in column order."""
    return (
        unpack_words(words, BITWIDTH, count)
        .unflatten(1, (-1, 8))[:, :, NIBBLE_OF_COLUMN]
        .flatten(1)
    )
