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

Files of compressed-tensors 0.13, which left gaps for 3, 5, 6 and 7 bits, are refused by their
number of words. Values are computed in float32 from the stored scales; the library's values are
identical if its scales are float32. A checkpoint that also quantizes activations or the KV cache is
refused: dropping that would change what it computes.

A layer belongs to the config group of the first target that matches: its name, then patterns
(`re:`), then the names of its classes, each in alphabetical order (as in
`compressed_tensors.utils.match.match_targets`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from qwlora.errors import SourceError, shortened
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
from qwlora.formats.huggingface.int32_words import (
    granularity_of_groups,
    pack_words,
    quantized_tensor,
    unpack_words,
)
from qwlora.formats.huggingface.safetensors_files import FLOATS, SafetensorsFiles
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Blocks, Granularity, PerChannel, PerTensor, Scheme
from qwlora.system.time_limit import SECONDS, time_limit

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
ACTIVATIONS = re.compile(r"\.(input|output|[qkv])_(scale|zero_point)$")


def _refusing(is_refused: Callable[[Any], Any], reason: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if is_refused(value):
            raise ValueError(reason)
        return value

    return AfterValidator(check)


def _valid_pattern(target: str) -> str:
    try:
        re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a valid regular expression ({error})") from error
    return target


_WEIGHTS_ONLY = (
    "quantizes more than weights. Only weights are read: to import them with float activations, "
    "remove this key from config.json"
)
_Unread = Annotated[Any, _refusing(bool, _WEIGHTS_ONLY)]
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

    @model_validator(mode="after")
    def _default_strategy(self) -> Self:
        if self.strategy is None:
            per_group = "channel" if self.group_size == -1 else "group"
            self.strategy = "tensor" if self.group_size is None else per_group  # type: ignore[assignment]
        if self.strategy == "group" and self.group_size is None:
            raise ValueError("strategy group needs a group_size")
        return self

    def layout(self, shape: tuple[int, ...], where: str) -> tuple[Granularity, tuple[int, ...]]:
        """The granularity of a layer `[out, in]`, and the shape of its scales."""
        if self.strategy == "tensor":
            return PerTensor(), ()
        size = shape[1] if self.strategy == "channel" else self.group_size or 0
        if size < 1 or shape[1] % size:
            raise SourceError(
                f"{where}: groups of {size} do not divide rows of {shape[1]} evenly, but all "
                "blocks must have the same size. Quantize the float model instead"
            )
        count = shape[1] // size
        return granularity_of_groups(shape[1], count, where), (shape[0], count)


class _Group(BaseModel):
    targets: list[Annotated[str, AfterValidator(_valid_pattern)]]
    weights: Weights | None = None
    format: _Format = None
    input_activations: _Unread = None
    output_activations: _Unread = None


class _Settings(BaseModel):
    """The `quantization_config`, as far as it says how weights are stored."""

    format: _Format = None
    config_groups: Annotated[
        dict[str, _Group],
        _refusing(
            lambda groups: not any(group.weights for group in groups.values()),
            "quantizes no weights. Give a checkpoint with quantized weights, or the float model",
        ),
    ]
    sparsity_config: Annotated[
        dict[str, Any] | None,
        _refusing(lambda v: v and v.get("format", "dense") != "dense", "weights must be dense"),
    ] = None
    transform_config: Annotated[
        dict[str, Any] | None,
        _refusing(
            lambda v: v and v.get("config_groups"),
            "applies rotations at run time; use a checkpoint without transforms",
        ),
    ] = None
    kv_cache_scheme: _Unread = None


def _read_settings(settings: Mapping[str, Any], where: str) -> _Settings:
    try:
        return _Settings.model_validate(dict(settings))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key, value = ".".join(map(str, problem["loc"])), shortened(repr(problem["input"]), 80)
        raise SourceError(
            f"{where}: {key} is {value}: {problem['msg'].removeprefix('Value error, ')}. If the "
            "file is as its tool wrote it, quantize the float model instead"
        ) from error


class CompressedTensorsCheckpoint(FolderCheckpoint):
    """A folder that compressed-tensors wrote.

    Args:
        folder: a folder with config.json and safetensors files.
        settings: the `quantization_config`.

    Raises:
        SourceError: see `FolderCheckpoint`; also if the settings name a format without integer
            weights.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        super().__init__(folder, lambda files: CompressedTensors(files, settings, self._place))

    def _place(self, stored: str) -> tuple[str, frozenset[str]]:
        """The model's name for a stored layer, and the names of its classes. A layer that the model
        has fused into a larger one (an expert) counts as a Linear."""
        for alias, origin in (copy for copies in self._origins.values() for copy in copies):
            if origin.converter is None and origin.sources[0][0] == f"{stored}.weight":
                path = alias.rpartition(".")[0]
                kinds = type(self.model.get_submodule(path)).__mro__
                return path, frozenset(k.__name__ for k in kinds if issubclass(k, nn.Module))
        return as_linear(stored)


def as_linear(stored: str) -> tuple[str, frozenset[str]]:
    """The name and classes of a Linear layer whose name in the model is its stored name."""
    return stored, frozenset({"Linear", "Module"})


class CompressedTensors:
    """The tensors of `files` under the float model's names (`FormatReader`).

    Args:
        files: the stored tensors.
        settings: the `quantization_config`.
        place: returns the model's name for a stored layer and the names of its classes.
    """

    def __init__(
        self,
        files: SafetensorsFiles,
        settings: Mapping[str, Any],
        place: Callable[[str], tuple[str, frozenset[str]]] = as_linear,
    ):
        self.files, self._place = files, place
        groups = _read_settings(settings, f"{str(files.folder)!r}, quantization_config")
        self._groups = [g for g in groups.config_groups.values() if g.weights is not None]
        stored = files.names()
        self._is_packed = {
            name.removesuffix("_scale"): False for name in stored if name.endswith(".weight_scale")
        } | {
            name.removesuffix("_packed"): True for name in stored if name.endswith(".weight_packed")
        }

    def names(self) -> list[str]:
        layers = self._is_packed.keys()
        parts = {f"{name.removesuffix('weight')}{part}" for name in layers for part in PARTS}
        floats = [n for n in self.files.names() if n not in parts and n not in layers]
        return [*layers, *(name for name in floats if not ACTIVATIONS.search(name))]

    def shape(self, name: str) -> tuple[int, ...]:
        if not self._is_packed.get(name, False):
            return self.files.shape(name)
        shape = self.files.read(f"{name}_shape").flatten().tolist()
        words = self.files.shape(f"{name}_packed")
        fits = len(shape) == len(words) == 2 and shape[0] == words[0]
        if not fits or not 0 <= shape[1] <= 32 * words[1]:
            raise SourceError(
                f"{self._where(name)}: weight_shape {shape} and weight_packed {list(words)} do not "
                "belong together; download the model again"
            )
        return int(shape[0]), int(shape[1])

    def read(self, name: str) -> Tensor | QuantizedTensor:
        if name not in self._is_packed:
            return self.files.read(name)
        where, shape, weights = self._where(name), self.shape(name), self._weights(name)
        if len(shape) != 2:
            raise SourceError(f"{where}: the weight has shape {list(shape)}, but must be a matrix")
        granularity, scales = weights.layout(shape, where)
        self._check_order(name, weights, shape[1])
        codes = self._codes(name, weights.num_bits, shape)
        scale = self.files.read_as(f"{name}_scale", FLOATS, scales, where, flat=True)
        offset = -self._zeros(name, weights, scales) - 2 ** (weights.num_bits - 1)
        return quantized_tensor(codes, weights.num_bits, granularity, scale, offset, where)

    def _where(self, name: str) -> str:
        return f"{str(self.files.folder)!r}: tensor {name!r} (compressed-tensors)"

    def _weights(self, name: str) -> Weights:
        """The settings of a layer's group, chosen as the module docstring says."""
        if len(self._groups) == 1 and (only := self._groups[0].weights) is not None:
            return only
        # if two groups have the same target, the last one wins
        by_target = {target: g.weights for g in self._groups for target in g.targets}
        layer = name.removesuffix(".weight")
        path, classes = self._place(layer)
        late = SourceError(
            f"{self._where(name)}: the regular expressions in the targets of config.json take more "
            f"than {SECONDS:g} s to match; write them without nested repetitions like (a+)+"
        )
        with time_limit(late):
            patterns = [
                target
                for target in sorted(by_target)
                if target.startswith("re:")
                and (re.match(target[3:], layer) or re.match(target[3:], path))
            ]
        for target in (layer, path, *patterns, *sorted(classes)):
            if (weights := by_target.get(target)) is not None:
                return weights
        raise SourceError(
            f"{self._where(name)}: no config group has a target that matches the layer's name "
            f"or class ({', '.join(sorted(classes - {'Module'}))}). Add it to the targets in "
            "config.json"
        )

    def _check_order(self, name: str, weights: Weights, in_features: int) -> None:
        if f"{name}_g_idx" not in self.files:
            return
        index = self.files.read(f"{name}_g_idx").long().flatten()
        in_order = torch.arange(in_features) // (weights.group_size or in_features)
        unordered = bool((index == -1).all())  # how the library marks layers without an order
        if not unordered and not torch.equal(index, in_order):
            raise SourceError(
                f"{self._where(name)} was quantized in activation order with scattered groups "
                "(actorder: group), which blocks cannot express. "
                "Quantize the float model again with actorder: weight, or without"
            )

    def _codes(self, name: str, bitwidth: int, shape: tuple[int, ...]) -> Tensor:
        """Unsigned codes."""
        where, half = self._where(name), 2 ** (bitwidth - 1)
        if self._is_packed[name]:
            needed = (shape[0], math.ceil(shape[1] * bitwidth / 32))
            words = self.files.read_as(f"{name}_packed", ("I32",), needed, where)
            return unpack_words(words, bitwidth, shape[1])
        codes = self.files.read_as(name, ("I8",), shape, where)
        if codes.numel() and not -half <= int(codes.min()) <= int(codes.max()) < half:
            raise SourceError(
                f"{where} holds values from {int(codes.min())} to {int(codes.max())}, which do not "
                f"fit in {bitwidth} bits; download the model again"
            )
        return (codes.to(torch.int16) + half).to(torch.uint8)

    def _zeros(self, name: str, weights: Weights, scales: tuple[int, ...]) -> Tensor:
        """Signed zero points, int32, in the shape of the scales."""
        where, stored, bitwidth = self._where(name), f"{name}_zero_point", weights.num_bits
        if stored not in self.files:
            if not weights.symmetric:
                raise SourceError(
                    f"{where}: config.json says symmetric: false, but {stored!r} is missing; "
                    "download the model again"
                )
            return torch.zeros(scales, dtype=torch.int32)
        if self._is_packed[name] and scales and self.files.dtype(stored) == "I32":
            needed = (math.ceil(scales[0] * bitwidth / 32), scales[1])
            words = self.files.read_as(stored, ("I32",), needed, where).t().contiguous()
            fields = unpack_words(words, bitwidth, scales[0]).t().to(torch.int32)
            zeros = fields - 2 ** (bitwidth - 1)
        else:
            zeros = self.files.read_as(stored, ("I8", "I32"), scales, where, flat=True)
        if weights.symmetric and bool(zeros.any()):
            raise SourceError(
                f"{where}: config.json says symmetric: true, but {int(zeros.count_nonzero())} of "
                f"{zeros.numel()} zero points in {stored!r} differ from 0. Set symmetric to what "
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
    """The tensors of a Linear layer in format pack-quantized, by the part of their name after the
    layer's. Offsets are integers."""
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
