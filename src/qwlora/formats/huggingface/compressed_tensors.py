"""compressed-tensors (llm-compressor, vLLM) in a Hugging Face folder: reads layers, and packs them.

For a layer [out, in] whose weights have `b` bits:

    pack-quantized   weight_packed int32 [out, words]: codes of a row as one bit stream
                     weight_shape [out, in]
                     weight_zero_point int32 [words, groups]: packed along the output
                     (strategies group and channel; for tensor, a single int8)
    int-quantized    weight int8 [out, in]: code - 2^(b - 1); weight_zero_point int8, shaped like
                     the scale (naive-quantized is the same)
    all              weight_scale float: tensor [1], channel [out, 1], group [out, in / g]

    W = (code - 2^(b - 1) - zero) * scale; zero is 0 if it is not stored

Values are computed in float32 from the stored scales; the library's values are identical if its
scales are float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from qwlora.errors import SourceError, foreign_as, problem_text
from qwlora.formats.huggingface.huggingface_folder import FormatReader
from qwlora.formats.huggingface.safetensors_files import FLOATS, SafetensorsFiles
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.packing import pack_words, unpack_words
from qwlora.grid.scheme import Blocks, PerChannel, PerTensor, Scheme

ACTIVATIONS = re.compile(r"\.(input|output|[qkv])_(scale|zero_point)$")
_Format = Literal[
    "pack-quantized", "int-quantized", "naive-quantized", "dense", "mixed-precision", None
]


class Weights(BaseModel):
    """The `weights` of one config group."""

    model_config = ConfigDict(strict=True)

    num_bits: Annotated[int, Field(ge=2, le=8)]
    type: Literal["int"] = "int"
    symmetric: bool = True
    strategy: Literal["tensor", "channel", "group", None] = None
    group_size: int | None = None


class _Group(BaseModel):
    targets: list[str]
    weights: Weights | None = None
    format: _Format = None
    input_activations: None = None
    output_activations: None = None


class _Dense(BaseModel):
    format: Literal["dense"] = "dense"


class _NoRotations(BaseModel):
    config_groups: Annotated[dict[str, Any], Field(max_length=0)] = {}


class _Settings(BaseModel):
    """The `quantization_config`, as far as it says how weights are stored."""

    # Quantized activations, a quantized KV cache and rotations must be None or empty: dropping them
    # would change what the checkpoint computes.
    format: _Format = None
    config_groups: Annotated[dict[str, _Group], Field(min_length=1)]
    sparsity_config: _Dense | None = None
    transform_config: _NoRotations | None = None
    kv_cache_scheme: None = None


class CompressedTensors(FormatReader):
    """The tensors of `files`, which compressed-tensors wrote; formats without integer weights are
    refused."""

    label = "compressed-tensors"
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    markers = ("weight_scale", "weight_packed")

    def __init__(self, files: SafetensorsFiles, settings: Mapping[str, Any]):
        super().__init__(files)
        try:
            groups = _Settings.model_validate(dict(settings)).config_groups.values()
        except ValidationError as error:
            raise self.settings_error(
                f"{problem_text(error.errors()[0])}. Only dense integer weights are read. "
                "Quantize the float model instead; or, to import the weights with float "
                "activations, remove the settings of activations and cache from config.json"
            ) from error
        self._groups = [(g.targets, g.weights) for g in groups if g.weights is not None]
        if not self._groups:
            raise self.settings_error(
                "config_groups quantizes no weights. Give a checkpoint with quantized weights, or "
                "the float model"
            )

    def names(self) -> list[str]:
        return [name for name in super().names() if not ACTIVATIONS.search(name)]

    def layer_shape(self, layer: str) -> tuple[int, ...]:
        if not self._is_packed(layer):
            return self.files.shape(f"{layer}.weight")
        shape = self.files.read(f"{layer}.weight_shape").flatten().tolist()
        words = self.files.shape(f"{layer}.weight_packed")
        fits = len(shape) == len(words) == 2 and shape[0] == words[0]
        if not fits or not 0 <= shape[1] <= 32 * words[1]:
            raise SourceError(
                f"{self.where(layer)}: weight_shape {shape} and weight_packed {list(words)} do not "
                "belong together; download the model again"
            )
        return int(shape[0]), int(shape[1])

    def read_layer(self, layer: str) -> QuantizedTensor:
        where, shape, weights = self.where(layer), self.layer_shape(layer), self._weights(layer)
        if len(shape) != 2:
            raise SourceError(f"{where}: the weight has shape {list(shape)}, but must be a matrix")
        strategy, size = weights.strategy, weights.group_size
        scales: tuple[int, ...] = ()
        if strategy != "tensor" and (strategy, size) != (None, None):
            if strategy == "channel" or (strategy is None and size == -1):
                size = shape[1]
            scales = (shape[0], self.group_count(layer, shape[1], size or 0))
        self._check_order(layer, weights, shape[1])
        codes = self._codes(layer, weights.num_bits, shape)
        scale = self.files.read_as(f"{layer}.weight_scale", FLOATS, scales, where, flat=True)
        offset = -self._zeros(layer, weights, scales) - 2 ** (weights.num_bits - 1)
        return self.quantized(layer, weights.num_bits, codes, scale, offset)

    def _is_packed(self, layer: str) -> bool:
        return f"{layer}.weight_packed" in self.files

    def _weights(self, layer: str) -> Weights:
        if len(self._groups) == 1:
            return self._groups[0][1]
        # Order of `compressed_tensors.utils.match.match_targets`: the layer's name, then patterns,
        # then its class names, each alphabetically. If two groups share a target, the last wins.
        by_target = {target: weights for targets, weights in self._groups for target in targets}
        path, module = self.module_of(layer)
        kinds = type(module).__mro__ if module is not None else (nn.Linear, nn.Module)
        classes = sorted(kind.__name__ for kind in kinds if issubclass(kind, nn.Module))
        invalid = f"{self.where(layer)}: a target is not a valid regular expression"
        with foreign_as(SourceError, invalid):
            patterns = [
                target
                for target in sorted(by_target)
                if target.startswith("re:") and any(re.match(target[3:], n) for n in (layer, path))
            ]
        for target in (layer, path, *patterns, *classes):
            if target in by_target:
                return by_target[target]
        raise SourceError(
            f"{self.where(layer)}: no config group has a target that matches the layer's name "
            f"or class ({', '.join(c for c in classes if c != 'Module')}). Add it to the targets "
            "in config.json"
        )

    def _check_order(self, layer: str, weights: Weights, in_features: int) -> None:
        if f"{layer}.weight_g_idx" not in self.files:
            return
        index = self.files.read(f"{layer}.weight_g_idx").long().flatten()
        in_order = torch.arange(in_features) // (weights.group_size or in_features)
        # The library marks layers without an order by -1 everywhere.
        unordered = bool((index == -1).all())
        if not unordered and not torch.equal(index, in_order):
            raise SourceError(
                f"{self.where(layer)} was quantized in activation order with scattered groups "
                "(actorder: group), which blocks cannot express. "
                "Quantize the float model again with actorder: weight, or without"
            )

    def _codes(self, layer: str, bitwidth: int, shape: tuple[int, ...]) -> Tensor:
        where, half = self.where(layer), 2 ** (bitwidth - 1)
        if self._is_packed(layer):
            # compressed-tensors 0.13 stored codes of 3, 5, 6 and 7 bits unsplit. Only the number of
            # words shows it; such files are refused.
            needed = (shape[0], math.ceil(shape[1] * bitwidth / 32))
            words = self.files.read_as(f"{layer}.weight_packed", ("I32",), needed, where)
            return unpack_words(words, bitwidth, shape[1])
        codes = self.files.read_as(f"{layer}.weight", ("I8",), shape, where)
        # Codes below the range wrap around, and are then too large.
        codes = (codes.to(torch.int16) + half).to(torch.uint8)
        if codes.numel() and int(codes.max()) >= 2 * half:
            raise SourceError(f"{where}: codes do not fit in {bitwidth} bits; download it again")
        return codes

    def _zeros(self, layer: str, weights: Weights, scales: tuple[int, ...]) -> Tensor:
        """Signed zero points, int32, in the shape of the scales."""
        where, bitwidth, name = self.where(layer), weights.num_bits, f"{layer}.weight_zero_point"
        if name not in self.files:
            if not weights.symmetric:
                raise SourceError(
                    f"{where}: config.json says symmetric: false, but {name!r} is missing; "
                    "download the model again"
                )
            return torch.zeros(scales, dtype=torch.int32)
        if self._is_packed(layer) and scales and self.files.dtype(name) == "I32":
            needed = (math.ceil(scales[0] * bitwidth / 32), scales[1])
            words = self.files.read_as(name, ("I32",), needed, where).t().contiguous()
            fields = unpack_words(words, bitwidth, scales[0]).t().to(torch.int32)
            zeros = fields - 2 ** (bitwidth - 1)
        else:
            zeros = self.files.read_as(name, ("I8", "I32"), scales, where, flat=True)
        if weights.symmetric and bool(zeros.any()):
            raise SourceError(
                f"{where}: config.json says symmetric: true, but {int(zeros.count_nonzero())} of "
                f"{zeros.numel()} zero points in {name!r} differ from 0. Set symmetric to what "
                "the model was quantized with"
            )
        return zeros.to(torch.int32)


def weights_settings(scheme: Scheme) -> dict[str, Any]:
    """A scheme as the `weights` of a config group."""
    match scheme.granularity:
        case Blocks(size):
            granularity: dict[str, Any] = {"strategy": "group", "group_size": size}
        case PerChannel():
            granularity = {"strategy": "channel"}
        case PerTensor():
            granularity = {"strategy": "tensor"}
    return {
        "num_bits": scheme.bitwidth,
        "type": "int",
        "symmetric": scheme.symmetric,
        "dynamic": False,
        **granularity,
    }


def layer_tensors(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a Linear layer in format pack-quantized, by their name after the layer's."""
    codes, encoding = quantized.codes, quantized.encoding
    bitwidth, by_group = encoding.scheme.bitwidth, encoding.scale.ndim > 0
    rows = len(codes) if by_group else 1
    scale = encoding.scale.float().reshape(rows, -1)
    tensors = {
        "weight_packed": pack_words(codes, bitwidth),
        "weight_shape": torch.tensor(codes.shape),
        "weight_scale": scale if by_group else scale.reshape(1),
    }
    if not encoding.scheme.symmetric:
        zero = -encoding.offset.reshape(rows, -1)
        words = pack_words(zero.to(torch.uint8).t().contiguous(), bitwidth).t().contiguous()
        signed = (zero - 2 ** (bitwidth - 1)).to(torch.int8).reshape(-1)
        tensors["weight_zero_point"] = words if by_group else signed
    return tensors
