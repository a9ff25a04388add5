"""Readers for GPTQ, AWQ and MLX checkpoints in a Hugging Face folder: integers in 32-bit words.

GPTQ and AWQ store a layer [out, in] in groups of `g` inputs as three tensors, with these axes;
words hold the axis with a star, as a little-endian bit stream:

    layout         writers                   qweight         qzeros            scales
    gptq, gptq_v2  AutoGPTQ, GPT-QModel      [in*, out]      [groups, out*]    [groups, out]
    gemm           AutoAWQ                   [in, out*]      [groups, out*]    [groups, out]
    gemv           AutoAWQ                   [out, in*]      [out, groups*]    [out, groups]

    W[o, i] = scales[o, group(i)] * (code[o, i] - zero[o, group(i)])

GPTQ has 2, 3, 4 or 8 bits. Version 1 stores `zero - 1`, version 2 `zero`. `g_idx` int32 [in] is the
group of each input, if it is stored. AutoRound writes negative scales (see `quantized_of`). AWQ has
4 bits and groups in order.

Values are computed in float32 from the stored scales; those of GPT-QModel and AutoAWQ are
identical if their scales are float32.

MLX, as `mlx_lm.convert -q` writes it: config.json has a `quantization` section: `group_size`,
`bits`, and, under the name of a module that differs, its own `group_size` and `bits`, or false if
it stays float. For a Linear or Embedding [out, in]:

    weight   uint32 [out, in * bits / 32]   codes; each row is a little-endian bit stream
    scales   float [out, in / group_size]   may be negative
    biases   float [out, in / group_size]   the value of code 0; not the layer's own bias

    W[o, i] = scales[o, g] * code[o, i] + biases[o, g],   g = i // group_size

Codes of a group with a negative scale are counted from the other end (`quantized_of`).

Source: `mlx.core.quantize` and `mlx_lm.utils` of mlx 0.32 and mlx-lm 0.32. Modes other than
`affine` (mxfp4, nvfp4, mxfp8) have no integers and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from qwlora.errors import SourceError, listed
from qwlora.formats import MLX_BITWIDTHS
from qwlora.formats.huggingface.huggingface_folder import FormatReader
from qwlora.formats.huggingface.safetensors_files import FLOATS, SafetensorsFiles
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.packing import unpack_words

PARTS = ("qweight", "qzeros", "scales")
_GPTQ_AXES = (("in*", "out"), ("groups", "out*"), ("groups", "out"))
AXES = {
    "gptq": _GPTQ_AXES,
    "gptq_v2": _GPTQ_AXES,
    "gemm": (("in", "out*"), ("groups", "out*"), ("groups", "out")),
    "gemv": (("out", "in*"), ("out", "groups*"), ("out", "groups")),
}
LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm", "gemv")}
BITWIDTHS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
# In `gemm`, AutoAWQ stores column (0, 2, 4, 6, 1, 3, 5, 7)[n] of each eight in nibble n of a word.
NIBBLE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]
# One in every field of a word.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


class _Size(NamedTuple):
    bitwidth: int
    inputs: int
    outputs: int
    groups: int

    def of(self, axis: str) -> int:
        plain = axis.rstrip("*")
        length = {"in": self.inputs, "out": self.outputs, "groups": self.groups}[plain]
        return length if plain == axis else math.ceil(length * self.bitwidth / 32)


class QweightTensors(FormatReader):
    """The tensors of `files`, which AutoGPTQ, GPT-QModel or AutoAWQ wrote.

    Args:
        settings: the `quantization_config`, or the contents of the older `quantize_config.json`
            (GPTQ) or `quant_config.json` (AWQ).
        method: `gptq` or `awq`.

    Raises:
        SourceError: the settings name another layout, bitwidth or group size.
    """

    parts, markers = (*PARTS, "g_idx"), ("qweight",)

    def __init__(self, files: SafetensorsFiles, settings: Mapping[str, Any], method: str):
        super().__init__(files)
        self.label = method.upper()
        keys = ("checkpoint_format", "format") if method == "gptq" else ("version", "format")
        layout = next((str(settings[key]).lower() for key in keys if settings.get(key)), "")
        layout = "marlin" if settings.get("is_marlin_format") else layout
        self.layout = layout or LAYOUTS[method][0]
        self.bitwidth: Any = settings.get("bits", settings.get("w_bit"))
        self.group_size: Any = settings.get("group_size", settings.get("q_group_size"))
        # GPT-QModel lists layers of other bitwidths here by regular expressions. Their bitwidth
        # follows from the shapes.
        self.is_mixed = bool(settings.get("dynamic"))
        size, problem = self.group_size, ""
        if self.layout not in LAYOUTS[method]:
            known = " and ".join(LAYOUTS[method])
            problem = (
                f"{self.label} layout {self.layout!r} is not supported; {known} are. Save the "
                "checkpoint in one of these"
            )
        elif type(self.bitwidth) is not int or self.bitwidth not in BITWIDTHS[method]:
            problem = (
                f"bits is {self.bitwidth!r}, but {self.label} files have "
                f"{listed(BITWIDTHS[method])} bits; quantize the float model instead"
            )
        elif method == "awq" and (type(size) is not int or not (size > 0 or size == -1)):
            problem = f"group_size is {size!r}; a positive integer is needed, or -1 for whole rows"
        if problem:
            raise self.settings_error(problem)

    def layer_shape(self, layer: str) -> tuple[int, ...]:
        size = self._size(layer)
        return size.outputs, size.inputs

    def read_layer(self, layer: str) -> QuantizedTensor:
        size = self._size(layer)
        codes, zeros, scale = (self._part(layer, part, size) for part in PARTS)
        scale, offset = scale[:, : size.groups], -zeros.to(torch.int32)
        if f"{layer}.g_idx" in self.files:
            order = self._groups(layer, size)
            scale, offset = scale[:, order], offset[:, order]
        return self.quantized(layer, size.bitwidth, codes, scale, offset)

    def _part(self, layer: str, part: str, size: _Size) -> Tensor:
        values = self.files.read(f"{layer}.{part}")
        first, second = AXES[self.layout][PARTS.index(part)]
        if first.endswith("*"):
            first, second, values = second, first, values.t()
        if second.endswith("*"):
            adds_one = part == "qzeros" and self.layout == "gptq"
            # Writers of version 1 subtract one from the packed word, so a zero point of 0 borrows
            # from its neighbor. Adding one to the word undoes it. With 3 bits, whose fields cross
            # words, GPT-QModel 7.7 works by field (docs/log/formats.md).
            if adds_one and size.bitwidth in _ONES:
                values = values + _ONES[size.bitwidth]
            values = unpack_words(values, size.bitwidth, size.of(second.rstrip("*")))
            if adds_one and size.bitwidth not in _ONES:
                values = (values + 1) & (2**size.bitwidth - 1)
            if self.layout == "gemm":
                values = values.unflatten(1, (-1, 8))[:, :, NIBBLE_OF_COLUMN].flatten(1)
        return values if first == "out" else values.t()

    def _size(self, layer: str) -> _Size:
        """The sizes of a layer, after checking that types and shapes of its tensors agree."""
        where, index = self.where(layer), f"{layer}.g_idx"
        shapes = [
            self.files.shape(name) if (name := f"{layer}.{part}") in self.files else ()
            for part in PARTS
        ]
        if any(len(shape) != 2 for shape in shapes):
            raise SourceError(
                f"{where}: {', '.join(PARTS)} have the shapes {[*map(list, shapes)]}, but all must "
                "be matrices; download the model again"
            )
        bitwidth, axes = self.bitwidth, AXES[self.layout]
        length = {
            axis.rstrip("*"): count * 32 // bitwidth if axis.endswith("*") else count
            for axis, count in zip(axes[0], shapes[0], strict=True)
        }
        if self.label == "GPTQ" and index in self.files:
            length["in"] = math.prod(self.files.shape(index))
            words = shapes[0][0]
            fitting = [b for b in BITWIDTHS["gptq"] if words == math.ceil(length["in"] * b / 32)]
            if self.is_mixed and fitting and bitwidth not in fitting:
                bitwidth = fitting[0]
        if self.label == "GPTQ":
            groups = shapes[2][0]
            group = length["in"] / groups if groups else 0
        else:
            group = length["in"] if self.group_size == -1 else self.group_size
        groups = self.group_count(layer, length["in"], group)
        size = _Size(bitwidth, length["in"], length["out"], groups)
        for part, part_axes, shape in zip(PARTS, axes, shapes, strict=True):
            needed = [size.of(axis) for axis in part_axes]
            # AutoAWQ pads the groups of `gemv` to whole words.
            if self.layout == "gemv" and part != "qweight":
                needed[1] = max(needed[1], shape[1])
            dtypes = FLOATS if part == "scales" else ("I32",)
            self.files.check(f"{layer}.{part}", dtypes, needed, where)
        return size

    def _groups(self, layer: str, size: _Size) -> Int[Tensor, " blocks"]:
        """The group number of each block of contiguous inputs."""
        where, count = self.where(layer), size.groups
        index = self.files.read(f"{layer}.g_idx").reshape(-1).long()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < count:
            raise SourceError(
                f"{where}: g_idx contains group {int(index.max())} or {int(index.min())}, but "
                f"there are {count} groups; download the model again"
            )
        # Blocks are contiguous inputs; the number of a group does not matter.
        runs = index.view(count, -1)
        if not bool((runs == runs[:, :1]).all()):
            raise SourceError(
                f"{where} was quantized in activation order (desc_act), so the inputs of a group "
                "are scattered, which blocks cannot express. "
                "Quantize the float model again with desc_act=False, or with act_group_aware=True "
                "in GPT-QModel"
            )
        return runs[:, 0]


class MlxTensors(FormatReader):
    """The tensors of `files`; `settings` is the `quantization` section of config.json."""

    label, parts, markers = "MLX", ("weight", "scales", "biases"), ("scales",)

    def __init__(self, files: SafetensorsFiles, settings: Mapping[str, Any]):
        super().__init__(files)
        self.settings = settings

    def layer_shape(self, layer: str) -> tuple[int, ...]:
        _, group = self._layout(layer)
        rows, groups = self.files.shape(f"{layer}.scales")
        return rows, groups * group

    def read_layer(self, layer: str) -> QuantizedTensor:
        bitwidth, group = self._layout(layer)
        words, scale, minimum = (self.files.read(f"{layer}.{part}") for part in self.parts)
        codes = unpack_words(words, bitwidth, scale.shape[-1] * group)
        return self.quantized(layer, bitwidth, codes, scale, minimum.to(torch.float32))

    def _layout(self, layer: str) -> tuple[int, int]:
        """Bitwidth and group size of a layer, after checking that its tensors fit them."""
        # mlx-lm stores the settings of a module that differs under the module's name.
        of_layer = self.settings.get(layer)
        settings = of_layer if isinstance(of_layer, Mapping) else self.settings
        bitwidth: Any = settings.get("bits")
        group: Any = settings.get("group_size")
        if (mode := settings.get("mode", "affine")) != "affine":
            raise self.settings_error(
                f"MLX mode {mode!r} of {layer!r} is not supported, only affine, which has "
                "integers. Quantize again with mlx_lm.convert -q --q-mode affine"
            )
        are_integers = type(bitwidth) is type(group) is int
        if not are_integers or bitwidth not in MLX_BITWIDTHS or group < 1:
            raise SourceError(
                f"{self.where(layer)}: config.json gives it bits {bitwidth!r} and group_size "
                f"{group!r}, but MLX has {', '.join(map(str, MLX_BITWIDTHS))} bits and a whole "
                "number"
            )
        where = f"{self.where(layer)}, {bitwidth} bits in groups of {group}"
        weight = f"{layer}.weight"
        stored = self.files.shape(weight)
        if len(stored) != 2:
            raise SourceError(
                f"{where}: the weight has shape {list(stored)}, but must be a matrix: experts that "
                "MLX has stacked are not supported. Quantize the float model instead"
            )
        rows, words = stored
        groups = words * 32 // bitwidth // group
        self.files.check(weight, ("U32",), (rows, groups * group * bitwidth // 32), where)
        for part in ("scales", "biases"):
            self.files.check(f"{layer}.{part}", FLOATS, (rows, groups), where)
        return bitwidth, group
