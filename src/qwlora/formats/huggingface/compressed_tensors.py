"""Reader for compressed-tensors checkpoints (llm-compressor, vLLM) in a Hugging Face folder.

For a layer [out, in] whose weights have `b` bits:

    pack-quantized   weight_packed int32 [out, words]: codes along the input, plus `2^(b - 1)`
                     weight_shape [out, in]
                     weight_zero_point int32 [words, groups]: packed along the output
                     (strategies group and channel; for tensor, a single int8)
    int-quantized    weight int8 [out, in]; weight_zero_point int8, shaped like the scale
                     (naive-quantized is the same)
    all              weight_scale float: tensor [1], channel [out, 1], group [out, in / g]

    W = (code - zero) * scale, with signed codes; zero is 0 if it is not stored

The codes of a row are one bit stream; files of compressed-tensors 0.13, which left gaps for 3, 5, 6
and 7 bits, are refused by their number of words. Values are computed in float32 from the stored
scales; the library's values are identical if its scales are float32. A checkpoint that also
quantizes activations or the KV cache is refused: dropping that would change what it computes.

A layer belongs to the config group of the first target that matches: its name, then patterns
(`re:`), then the names of its classes, each in alphabetical order (as in
`compressed_tensors.utils.match.match_targets`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwlora.errors import SourceError
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
from qwlora.formats.huggingface.int32_words import blocks, quantized, unpack_words
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Granularity, PerTensor
from qwlora.system.time_limit import SECONDS, time_limit

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "dense", "mixed-precision")
STRATEGIES = ("tensor", "channel", "group")
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
ACTIVATIONS = re.compile(r"\.(input|output|[qkv])_(scale|zero_point)$")
_READS_WEIGHTS_ONLY = (
    "and only weights are read. To import the weights alone, with float activations, remove {} "
    "from config.json"
)


@dataclass(frozen=True)
class Weights:
    """The `weights` of one config group."""

    bitwidth: int
    symmetric: bool
    strategy: str
    group_size: int | None


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
        weight = f"{stored}.weight"
        for alias, origin in (copy for copies in self._origins.values() for copy in copies):
            if origin.converter is None and origin.sources[0][0] == weight:
                path = alias.rpartition(".")[0]
                return path, frozenset(
                    kind.__name__
                    for kind in type(self.model.get_submodule(path)).__mro__
                    if issubclass(kind, nn.Module)
                )
        return as_linear(stored)


def as_linear(stored: str) -> tuple[str, frozenset[str]]:
    """The name and classes of a Linear layer whose name in the model is its stored name."""
    return stored, frozenset({"Linear", "Module"})


class CompressedTensors:
    """The tensors of `files` under the float model's names.

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
        self._where_settings = f"{str(files.folder)!r}, quantization_config"
        self._groups = _config_groups(settings, self._where_settings)
        held = files.names()
        packed = {
            name.removesuffix("_packed"): True for name in held if name.endswith(".weight_packed")
        }
        plain = {
            name.removesuffix("_scale"): False for name in held if name.endswith(".weight_scale")
        }
        self._packed = plain | packed

    def names(self) -> list[str]:
        """Names of the float model's tensors."""
        inner = {f"{name.removesuffix('weight')}{part}" for name in self._packed for part in PARTS}
        return [
            *self._packed,
            *(
                n
                for n in self.files.names()
                if n not in inner and n not in self._packed and not ACTIVATIONS.search(n)
            ),
        ]

    def shape(self, name: str) -> tuple[int, ...]:
        """`[out, in]` of a quantized layer."""
        if not self._packed.get(name, False):
            return self.files.shape(name)
        shape = self.files.read(self._part(name, "weight_shape")).flatten().tolist()
        words = self.files.shape(f"{name}_packed")
        if (
            len(shape) != 2
            or len(words) != 2
            or shape[0] != words[0]
            or not 0 <= shape[1] <= 32 * words[1]
        ):
            raise SourceError(
                f"{self._where(name)}: weight_shape {shape} and weight_packed {list(words)} do not "
                "belong together; download the model again"
            )
        return int(shape[0]), int(shape[1])

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Read one tensor.

        Raises:
            SourceError: the layer's tensors do not match each other, or a scale or zero point is
                invalid.
        """
        if name not in self._packed:
            return self.files.read(name)
        where = self._where(name)
        weights = self._weights(name)
        shape = self.shape(name)
        if len(shape) != 2:
            raise SourceError(f"{where}: the weight has shape {list(shape)}, but must be a matrix")
        scale = self.files.read(self._part(name, "weight_scale")).to(torch.float32)
        granularity, expected = _layout(weights, shape, where)
        self._check_order(name, weights, shape[1])
        if scale.numel() != math.prod(expected):
            raise SourceError(
                f"{where}: the scales have shape {list(scale.shape)}, but strategy "
                f"{weights.strategy} on {list(shape)} needs {list(expected)}; download the model "
                "again"
            )
        half = 2 ** (weights.bitwidth - 1)
        codes = self._codes(name, weights.bitwidth, shape)
        offset = -self._zeros(name, weights, expected) - half
        scale, offset = scale.reshape(expected), offset.reshape(expected)
        return quantized(codes, weights.bitwidth, granularity, scale, offset, where)

    def _where(self, name: str) -> str:
        return f"{str(self.files.folder)!r}: tensor {name!r} (compressed-tensors)"

    def _part(self, name: str, part: str) -> str:
        full = f"{name.removesuffix('weight')}{part}"
        if full not in self.files:
            raise SourceError(f"{self._where(name)}: {full!r} is missing; download the model again")
        return full

    def _weights(self, name: str) -> Weights:
        """The config group of a layer, chosen as the module docstring says."""
        if len(self._groups) == 1:
            return self._groups[0][1]
        # if two groups have the same target, the last one wins
        by_target = {target: weights for targets, weights in self._groups for target in targets}
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
                if _matches(target, layer) or _matches(target, path)
            ]
        fitting = [
            target for target in (layer, path, *patterns, *sorted(classes)) if target in by_target
        ]
        if not fitting:
            kinds = ", ".join(sorted(classes - {"Module"}))
            raise SourceError(
                f"{self._where(name)}: no config group has a target that matches the layer's name "
                f"or class ({kinds}). Add it to the targets in config.json"
            )
        return by_target[fitting[0]]

    def _check_order(self, name: str, weights: Weights, in_features: int) -> None:
        order = f"{name.removesuffix('weight')}weight_g_idx"
        if order not in self.files:
            return
        index = self.files.read(order).long().flatten()
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
        half = 2 ** (bitwidth - 1)
        if self._packed[name]:
            return self._unpack(name, self.files.read(f"{name}_packed"), bitwidth, shape[1])
        codes = self.files.read(name)
        if codes.dtype != torch.int8:
            raise SourceError(
                f"{self._where(name)} is stored as {self.files.dtype(name)}, but must be int8"
            )
        if codes.numel() and not -half <= int(codes.min()) <= int(codes.max()) < half:
            raise SourceError(
                f"{self._where(name)} holds values from {int(codes.min())} to {int(codes.max())}, "
                f"which do not fit in {bitwidth} bits"
            )
        return (codes.to(torch.int16) + half).to(torch.uint8)

    def _unpack(self, name: str, words: Tensor, bitwidth: int, count: int) -> Tensor:
        """Unpack rows of `count` codes."""
        if words.dtype != torch.int32 or words.ndim != 2:
            raise SourceError(
                f"{self._where(name)}: packed integers are {words.dtype} of shape "
                f"{list(words.shape)}, but must be an int32 matrix"
            )
        needed = math.ceil(count * bitwidth / 32)
        if words.shape[1] != needed:
            raise SourceError(
                f"{self._where(name)}: {words.shape[1]} words per row do not hold {count} codes of "
                f"{bitwidth} bits, which need {needed}"
            )
        return unpack_words(words, bitwidth, count)

    def _zeros(self, name: str, weights: Weights, expected: tuple[int, ...]) -> Tensor:
        """Signed zero points, int32, in the shape of the scales."""
        stored = f"{name.removesuffix('weight')}weight_zero_point"
        if stored not in self.files:
            if not weights.symmetric:
                raise SourceError(
                    f"{self._where(name)}: config.json says symmetric: false, but {stored!r} is "
                    "missing; download the model again"
                )
            return torch.zeros(expected, dtype=torch.int32)
        zeros = self.files.read(stored)
        if (
            zeros.dtype == torch.int32
            and self._packed[name]
            and weights.strategy in ("group", "channel")
        ):
            rows, columns = expected
            if zeros.ndim != 2 or zeros.shape[1] != columns:
                raise SourceError(
                    f"{self._where(name)}: packed zero points have shape {list(zeros.shape)}, but "
                    f"the layer has {columns} groups"
                )
            zeros = self._unpack(name, zeros.t().contiguous(), weights.bitwidth, rows).t().to(
                torch.int32
            ) - 2 ** (weights.bitwidth - 1)
        if zeros.numel() != math.prod(expected) or zeros.is_floating_point():
            raise SourceError(
                f"{self._where(name)}: zero points are {zeros.dtype} of shape {list(zeros.shape)}, "
                f"but must be integers of shape {list(expected)}"
            )
        if weights.symmetric and bool(zeros.any()):
            raise SourceError(
                f"{self._where(name)}: config.json says symmetric: true, but "
                f"{int(zeros.count_nonzero())} of {zeros.numel()} zero points in {stored!r} differ "
                "from 0. Set symmetric to what the model was quantized with"
            )
        return zeros.to(torch.int32).reshape(expected)


def _layout(
    weights: Weights, shape: tuple[int, ...], where: str
) -> tuple[Granularity, tuple[int, ...]]:
    """The granularity, and the shape of the stored scales."""
    out_features, in_features = shape
    match weights.strategy:
        case "tensor":
            return PerTensor(), ()
        case "channel":
            return blocks(in_features, 1, where), (out_features, 1)
        case _:
            size = weights.group_size or 0
            if size < 1 or in_features % size:
                raise SourceError(
                    f"{where}: groups of {size} do not divide rows of {in_features} evenly, but "
                    "all blocks must have the same size. Quantize the float model instead"
                )
            count = in_features // size
            return blocks(in_features, count, where), (out_features, count)


def _matches(target: str, layer: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), layer) is not None


def _check_patterns(targets: Sequence[str], where: str) -> None:
    for target in targets:
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except (re.error, OverflowError, RecursionError) as error:
            raise SourceError(
                f"{where}: target {target!r} is not a valid regular expression ({error})"
            ) from error


def _config_groups(settings: Mapping[str, Any], where: str) -> list[tuple[list[str], Weights]]:
    """The targets and weight settings of each config group that quantizes weights.

    Raises:
        SourceError: a group has an unsupported format, strategy or type, or is malformed.
    """
    sparsity = _object(settings, "sparsity_config", where)
    if sparsity.get("format", "dense") != "dense":
        raise SourceError(
            f"{where}: sparse weights ({sparsity.get('format')!r}) are not supported; save the "
            "model as dense"
        )
    if _object(settings, "transform_config", where).get("config_groups"):
        raise SourceError(
            f"{where}: transform_config applies rotations at run time, which is not supported. Use "
            "a checkpoint without transforms"
        )
    if settings.get("kv_cache_scheme"):
        raise SourceError(
            f"{where}: kv_cache_scheme quantizes the KV cache, {_READS_WEIGHTS_ONLY.format('it')}"
        )
    found = []
    for label, group in _object(settings, "config_groups", where).items():
        if (
            not isinstance(group, Mapping)
            or not isinstance(group.get("targets"), list)
            or not all(isinstance(t, str) for t in group["targets"])
        ):
            raise SourceError(f"{where}: config group {label!r} has no list of targets")
        _check_patterns(group["targets"], f"{where}: config group {label!r}")
        layout = group.get("format") or settings.get("format") or "pack-quantized"
        if layout not in FORMATS:
            raise SourceError(
                f"{where}: format {layout!r} is not supported; {', '.join(FORMATS[:3])} are. "
                "Quantize the float model instead"
            )
        for key in ("input_activations", "output_activations"):
            if group.get(key):
                raise SourceError(
                    f"{where}: config group {label!r} quantizes activations ({key}), "
                    f"{_READS_WEIGHTS_ONLY.format(key)}"
                )
        if weights := _object(group, "weights", f"{where}, config group {label!r}"):
            found.append((group["targets"], _weights(weights, f"{where}, config group {label!r}")))
    if not found:
        raise SourceError(
            f"{where}: no config group quantizes weights. Give a checkpoint with quantized "
            "weights, or the float model"
        )
    return found


def _object(settings: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The object under `key`, or an empty one."""
    found = settings.get(key) or {}
    if not isinstance(found, Mapping):
        raise SourceError(f"{where}: {key} is {str(found)[:80]!r}, but must be an object")
    return found


def _weights(record: Mapping[str, Any], where: str) -> Weights:
    bitwidth, kind = record.get("num_bits"), record.get("type", "int")
    if kind != "int":
        raise SourceError(
            f"{where}: weights are {kind}{bitwidth}, but only integers are supported. Quantize the "
            "float model instead"
        )
    if type(bitwidth) is not int or not 2 <= bitwidth <= 8:
        raise SourceError(f"{where}: num_bits is {bitwidth!r}, but only 2 to 8 are supported")
    group_size = record.get("group_size")
    strategy = record.get("strategy") or (
        "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    )
    if strategy not in STRATEGIES:
        raise SourceError(
            f"{where}: strategy {strategy!r} is not supported; {', '.join(STRATEGIES)} are"
        )
    if strategy == "group" and type(group_size) is not int:
        raise SourceError(f"{where}: group_size is {group_size!r}, but must be an integer")
    symmetric = record.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise SourceError(f"{where}: symmetric is {symmetric!r}, but must be true or false")
    return Weights(bitwidth, symmetric, strategy, group_size)
