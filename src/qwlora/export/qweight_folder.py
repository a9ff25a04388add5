"""The `gptq` and `awq` targets' base: Hugging Face folders with GPTQ's or AWQ's int32 words.

    GPTQ   qweight int32 [in * bits / 32, out]      qzeros int32 [in / g, out * bits / 32]
           scales  float16 [in / g, out]            g_idx  int32 [in]
    AWQ    qweight int32 [in, out / 8]              qzeros int32 [in / g, out / 8]
           scales  float16 [in / g, out]            4 bits, layout gemm

    W = (code - zero) scale,      zero = -offset

Both have float16 scales and one bitwidth and group size for all layers: groups are 32, 64 or 128
inputs, or whole rows (-1). Coarser grids become groups with equal scales. Linear layers keep their
integers; an embedding is written as the floats that its codes stand for.

GPTQ's version 1 stores `zero - 1`, and programs disagree about a zero point of 0 (the next field
borrows, or it wraps around), so a base that has one is written in version 2 (`gptq_v2`).

See `formats/huggingface/qweight.py` for the readers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwlora.errors import ExportError
from qwlora.export.held_schemes import (
    QWEIGHT_GROUPS,
    awq_problem,
    gptq_problem,
    layer_kind_problem,
    one_layout_conflict,
)
from qwlora.export.weights_folder import (
    as_float16,
    float_tensors,
    layer_kind,
    layers_to_write,
    refuse,
    write_folder,
)
from qwlora.formats.huggingface.int32_words import pack_words
from qwlora.formats.huggingface.qweight import NIBBLE_OF_COLUMN
from qwlora.grid.encoding import aligned
from qwlora.grid.scheme import Lpbq, PerBlock, Scheme
from qwlora.nn.packed_layer import PackedLayer
from qwlora.nn.packed_modules import PackedEmbedding, PackedLinear


def write_gptq(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Write the base `model` as a GPTQ folder.

    Raises:
        ExportError: a layer's grid or kind does not fit; all are listed. Or layers differ in
            bitwidth.
    """
    layers = _layers("gptq", model, gptq_problem)
    bitwidth, group = _layout("gptq", layers)
    version = 2 if any(bool((-_offsets(layer) == 0).any()) for layer in layers.values()) else 1

    def parts(layer: PackedLayer) -> Iterator[tuple[str, Tensor]]:
        scales, zeros = _scales_and_zeros(layer, group)
        columns = layer.codes.shape[1]
        yield "qweight", pack_words(layer.codes, bitwidth).t().contiguous()
        yield "qzeros", pack_words(zeros - 1 if version == 1 else zeros, bitwidth)
        yield "scales", scales
        yield "g_idx", torch.arange(columns, dtype=torch.int32) // (columns // len(scales))

    settings = {
        "quant_method": "gptq",
        "bits": bitwidth,
        "group_size": group,
        "desc_act": False,
        "sym": all(layer.scheme.symmetric for layer in layers.values()),
        "lm_head": "lm_head.weight" in layers,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    if kept := _float_layers(model, layers):
        settings["dynamic"] = {f"-:^{re.escape(path)}$": {} for path in kept}
    _write(model, tokenizer, folder, layers, parts, settings)


def write_awq(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Write the base `model` as an AWQ folder. Raises like `write_gptq`."""
    layers = _layers("awq", model, awq_problem)
    _, group = _layout("awq", layers)

    def parts(layer: PackedLayer) -> Iterator[tuple[str, Tensor]]:
        scales, zeros = _scales_and_zeros(layer, group)
        yield "qweight", _awq_words(layer.codes.t().contiguous())
        yield "qzeros", _awq_words(zeros)
        yield "scales", scales

    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": _float_layers(model, layers) or None,
    }
    _write(model, tokenizer, folder, layers, parts, settings)


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    layers: dict[str, PackedLayer],
    parts: Callable[[PackedLayer], Iterator[tuple[str, Tensor]]],
    settings: dict[str, Any],
) -> None:
    tensors, problems = float_tensors(model), []
    for name, layer in packed_embeddings(model).items():
        tensors[name] = layer.tensor.dequantize()
    for name, layer in layers.items():
        try:
            path = name.removesuffix(".weight")
            tensors |= {f"{path}.{part}": tensor for part, tensor in parts(layer)}
        except ExportError as error:
            problems.append(f"{name}: {error}")
    refuse(settings["quant_method"], problems)
    write_folder(model, tokenizer, folder, tensors, {"quantization_config": settings})


def packed_embeddings(model: PreTrainedModel) -> dict[str, PackedLayer]:
    """Packed embeddings by the name of their weight."""
    return {
        name: layer
        for name, layer in layers_to_write(model).items()
        if isinstance(layer, PackedEmbedding)
    }


def _layers(
    target: str, model: PreTrainedModel, problem: Callable[[Scheme], str | None]
) -> dict[str, PackedLayer]:
    """The layers that keep their integers.

    Raises:
        ExportError: one does not fit; all are listed.
    """
    found, problems = {}, []
    for name, layer in layers_to_write(model).items():
        if isinstance(layer, PackedEmbedding):
            continue
        if why := _kind_problem(layer) or problem(layer.scheme):
            problems.append(f"{name}: {why}")
        found[name] = layer
    refuse(target, problems)
    return found


def _kind_problem(layer: PackedLayer) -> str | None:
    if problem := layer_kind_problem(layer_kind(layer), "GPTQ or AWQ"):
        return problem
    if wrong := [size for size in layer.tensor.shape if size % 32]:
        return f"the format's words need sizes that 32 divides, not {wrong[0]}"
    return None


def _layout(target: str, layers: dict[str, PackedLayer]) -> tuple[int, int]:
    """Bitwidth and group size of all layers.

    Raises:
        ExportError: the bitwidths differ, or a group does not divide the inputs of a layer.
    """
    schemes = {layer.scheme for layer in layers.values()}
    if conflict := one_layout_conflict(schemes):
        raise ExportError(f"{target} cannot hold this base: {conflict}")
    sizes = [s.granularity.size for s in schemes if isinstance(s.granularity, PerBlock | Lpbq)]
    group = next((g for g in QWEIGHT_GROUPS if sizes and all(n % g == 0 for n in sizes)), -1)
    if group > 0:
        widths = {name: layer.codes.shape[1] for name, layer in layers.items()}
        problem = f"inputs do not divide into groups of {group}"
        refuse(target, [f"{name}: {n} {problem}" for name, n in widths.items() if n % group])
    return next(iter(schemes)).bitwidth, group


def _float_layers(model: nn.Module, layers: dict[str, PackedLayer]) -> list[str]:
    """Paths of Linear layers that keep floats, except the output head, which is float anyway."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | PackedLinear)
        and f"{path}.weight" not in layers
        and path != "lm_head"
    ]


def _offsets(layer: PackedLayer) -> Tensor:
    return layer.encoding.offset


def _scales_and_zeros(layer: PackedLayer, group: int) -> tuple[Tensor, Tensor]:
    """float16 and uint8, both [groups, out].

    Raises:
        ExportError: a scale is not a float16.
    """
    encoding, (rows, columns) = layer.encoding, layer.codes.shape
    granularity, count = layer.scheme.granularity, 1 if group < 0 else columns // group
    spread = []
    for number in (encoding.scale, -encoding.offset):
        if isinstance(granularity, PerBlock | Lpbq):
            wide = number.repeat_interleave(granularity.size // group, dim=1)
        else:
            wide = aligned(number, granularity, 2).expand(rows, count)
        spread.append(wide.t().contiguous())
    return as_float16(spread[0]), spread[1].to(torch.uint8)


def _awq_words(codes: Tensor) -> Tensor:
    """Pack [rows, columns] in AWQ's order of nibbles."""
    order = [NIBBLE_OF_COLUMN.index(nibble) for nibble in range(8)]
    return pack_words(codes.unflatten(1, (-1, 8))[:, :, order].flatten(1), 4)
