"""The `hf` target's base: a Hugging Face folder in compressed-tensors' format pack-quantized.

    weight_packed      int32 [out, words]   codes of a row as one little-endian bit stream
    weight_scale       float32              [1] per tensor, [out, 1] per channel, [out, in / g]
    weight_zero_point  int32 [words, groups], packed along the output; int8 [1] per tensor
    weight_shape       int64 [2]

    W = (code - 2^(b-1) - zero) scale,      zero = -offset - 2^(b-1)

transformers, vLLM and SGLang read it. Linear layers keep their integers; a packed embedding is
written as the floats that its codes stand for, since the format has integers for Linear only. Grids
with a float offset do not fit.

transformers (5.24) keeps the integers until the first forward, and until then a layer has no weight
for PEFT to find; asymmetric grids do not load like that at all. `dequantize: true` makes it unpack
at once, but then it takes the scheme of the first group for all layers. So a base with one scheme
says `dequantize: true`, one with several must be symmetric, and run once before an adapter is
attached. vLLM ignores this key.

See `formats/huggingface/compressed_tensors.py` for the reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwlora.errors import ExportError
from qwlora.export.format_limits import (
    LayerKind,
    compressed_tensors_problem,
    layer_kind_problem,
    transformers_conflict,
)
from qwlora.export.weights.weights_folder import (
    float_tensors,
    layer_kind,
    layers_to_write,
    refuse,
    write_folder,
)
from qwlora.formats.huggingface.int32_words import pack_words
from qwlora.grid.scheme import Blocks, PerChannel, PerTensor, Scheme
from qwlora.nn.packed_layer import PackedLayer
from qwlora.nn.packed_modules import PackedEmbedding, PackedLinear


def write_compressed_tensors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Write the base `model`.

    Raises:
        ExportError: a layer's grid or kind does not fit; all are listed. Or an asymmetric grid is
            not the only one.
    """
    layers = layers_to_write(model)
    refuse("hf", [f"{name}: {p}" for name, layer in layers.items() if (p := _problem(layer))])
    tensors = float_tensors(model)
    groups: dict[Scheme, list[str]] = {}
    for name, layer in layers.items():
        if isinstance(layer, PackedEmbedding):
            tensors[name] = layer.tensor.dequantize()
            continue
        path = name.removesuffix(".weight")
        tensors |= {f"{path}.{part}": tensor for part, tensor in _parts(layer)}
        groups.setdefault(layer.scheme, []).append(path)
    if conflict := transformers_conflict(groups):
        raise ExportError(f"hf cannot hold this base: {conflict}")
    packed = {path for paths in groups.values() for path in paths}
    ignored = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | PackedLinear) and path not in packed
    ]
    settings: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(groups) == 1 else paths,
                "weights": _weights(scheme),
            }
            for i, (scheme, paths) in enumerate(groups.items())
        },
    }
    if len(groups) == 1:
        settings["dequantize"] = True
    write_folder(model, tokenizer, folder, tensors, {"quantization_config": settings})


def _problem(layer: PackedLayer) -> str | None:
    kind = layer_kind(layer)
    if problem := layer_kind_problem(kind, "compressed-tensors"):
        return problem
    return compressed_tensors_problem(layer.scheme) if kind is LayerKind.LINEAR else None


def _weights(scheme: Scheme) -> dict[str, Any]:
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


def _parts(layer: PackedLayer) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of a Linear layer."""
    quantized = layer.quantized
    encoding, scheme = quantized.encoding, layer.scheme
    by_group = not isinstance(scheme.granularity, PerTensor)
    rows = len(quantized.codes) if by_group else 1
    yield "weight_packed", pack_words(quantized.codes, scheme.bitwidth)
    yield "weight_shape", torch.tensor(quantized.codes.shape)
    scale = encoding.scale.float().reshape(rows, -1)
    yield "weight_scale", scale if by_group else scale.reshape(1)
    if not scheme.symmetric:
        zero = -encoding.offset.reshape(rows, -1)
        if by_group:
            stored = pack_words(zero.to(torch.uint8).t().contiguous(), scheme.bitwidth)
            yield "weight_zero_point", stored.t().contiguous()
        else:
            yield "weight_zero_point", (zero - 2 ** (scheme.bitwidth - 1)).to(torch.int8).reshape(1)
