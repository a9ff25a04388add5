"""The `gguf` target: base.gguf with the base's integers, and adapters as GGUF LoRA, for llama.cpp.

The base must come from a GGUF file: its metadata and tokenizer are copied, and its names and orders
of rows are used, whatever the architecture. Tensors that are what the file holds are copied as they
are; if all are, base.gguf is the file itself, byte for byte.

    Q4_0, Q5_0, Q8_0   symmetric, 4, 5 and 8 bits     (code - 2^(b-1)) d
    Q4_1, Q5_1         float offset, 4 and 5 bits      code d + m

Blocks have 32 weights; d and m are float16, so scales must have float16's precision (those of
`base.weights` in blocks do). Coarser grids become blocks whose d are equal.

    blk.N.attn_q.weight.lora_a [r, in], .lora_b [out, r]     rows in the file's order

The scale is in lora_b, and no alpha is written: llama.cpp then takes 1.

Source: `ggml-common.h`, and `llama-adapter.cpp` of llama.cpp (b11739).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwlora.errors import ExportError
from qwlora.export.canonical_adapter import CanonicalAdapter
from qwlora.export.format_limits import gguf_problem
from qwlora.export.weights.weights_folder import as_float16, layers_to_write, refuse
from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint
from qwlora.grid.encoding import spread
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.nn.packed_layer import PackedLayer
from qwlora.system.optional_packages import require

BASE = "base.gguf"
ADAPTER = "adapter.gguf"
BLOCK = 32


def write_gguf(model: PreTrainedModel, source: Path | None, folder: Path) -> None:
    """Write the base `model`.

    Args:
        source: the GGUF file that the model came from.

    Raises:
        ExportError: the model came from no GGUF file, or a layer's grid does not fit.
        MissingExtraError: the `gguf` extra is not installed.
    """
    if source is None:
        raise ExportError(
            "gguf cannot be written for this model: metadata and tokenizer are taken from the "
            "GGUF file that a model came from, and this one came from no GGUF file. Give a .gguf "
            "file as model.source, or remove gguf from export.targets"
        )
    checkpoint, blocks = GgufCheckpoint(source), dict[str, np.ndarray[Any, Any]]()
    problems, kinds = [], dict[str, str]()
    for name, layer in layers_to_write(model).items():
        stored = checkpoint.read(name)
        if isinstance(stored, QuantizedTensor) and stored.equals(layer.quantized):
            continue
        if problem := gguf_problem(layer.scheme) or _width_problem(layer):
            problems.append(f"{name}: {problem}")
            continue
        try:
            target, rows = checkpoint.stored_rows(name)
            kinds[target], blocks[target] = _blocks(layer, rows)
        except ExportError as error:
            problems.append(f"{name}: {error}")
    refuse("gguf", problems)
    if not blocks:
        shutil.copyfile(source, folder / BASE)
        return
    _copy_with(source, folder / BASE, kinds, blocks)


def write_gguf_adapter(adapter: CanonicalAdapter, base: Path, folder: Path) -> None:
    """Write an adapter for the base in the file `base`.

    Raises:
        ExportError: the file holds a module's weight in a form that a LoRA cannot be added to.
    """
    gguf = require("gguf", "gguf")
    checkpoint = GgufCheckpoint(base)
    writer = gguf.GGUFWriter(folder / ADAPTER, checkpoint.file.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    if adapter.base_fingerprint is not None:
        writer.add_string("qwlora.base_fingerprint", adapter.base_fingerprint)
    for module, (a, b) in sorted(adapter.factors.items()):
        name, rows = checkpoint.stored_rows(f"{module}.weight")
        writer.add_tensor(f"{name}.lora_a", a.numpy())
        writer.add_tensor(f"{name}.lora_b", _in_order(b, rows).numpy())
    _finish(writer)


def float_copy(source: Path, target: Path) -> None:
    """Write the GGUF file `source` with all weights as float32, by the gguf package."""
    gguf = require("gguf", "gguf")
    reader = gguf.GGUFReader(source)
    writer = _writer_like(gguf, reader, target)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    _finish(writer)


def _copy_with(
    source: Path, target: Path, kinds: dict[str, str], blocks: dict[str, np.ndarray[Any, Any]]
) -> None:
    """Copy a GGUF file with other contents of some tensors."""
    gguf = require("gguf", "gguf")
    reader = gguf.GGUFReader(source)
    writer = _writer_like(gguf, reader, target)
    for tensor in reader.tensors:
        if tensor.name in blocks:
            kind = gguf.GGMLQuantizationType[kinds[tensor.name]]
            writer.add_tensor(tensor.name, blocks[tensor.name], raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    _finish(writer)


def _writer_like(gguf: Any, reader: Any, target: Path) -> Any:
    """A writer with all metadata of a file."""
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, of)
    return writer


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _width_problem(layer: PackedLayer) -> str | None:
    columns = layer.tensor.shape[-1]
    return f"{columns} inputs do not divide into blocks of 32" if columns % BLOCK else None


def _in_order(values: Tensor, rows: Tensor) -> Tensor:
    """Rows of a parameter in the order in which the file stores them."""
    stored = torch.empty_like(values)
    stored[rows] = values
    return stored.contiguous()


def _blocks(layer: PackedLayer, rows: Tensor) -> tuple[str, np.ndarray[Any, Any]]:
    """Type and bytes [out, bytes] of a layer in the file's order of rows.

    Raises:
        ExportError: a scale or an offset is not a float16.
    """
    scheme, codes = layer.scheme, _in_order(layer.codes, rows)
    encoding = layer.encoding
    numbers = [encoding.scale]
    if encoding.scheme.float_offset:
        numbers.append(encoding.minimum)
    per_block = [_in_order(_per_block(layer, number), rows) for number in numbers]
    halves = [as_float16(number) for number in per_block]
    parts = [half.unsqueeze(-1).view(torch.uint8) for half in halves]
    grouped = codes.unflatten(-1, (-1, BLOCK))
    if scheme.bitwidth == 8:
        parts.append((grouped.to(torch.int16) - 128).to(torch.int8).view(torch.uint8))
    else:
        if scheme.bitwidth == 5:
            parts.append(_fifth_bits(grouped))
        low = grouped & 15
        parts.append(low[..., :16] | (low[..., 16:] << 4))
    kind = f"Q{scheme.bitwidth}_{1 if scheme.float_offset else 0}"
    return kind, torch.cat(parts, -1).flatten(1).numpy()


def _fifth_bits(grouped: Tensor) -> Tensor:
    """Bit 4 of 32 codes as four bytes, code i in bit i."""
    high = (grouped >> 4).unflatten(-1, (4, 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    return (high * weights).sum(-1, dtype=torch.uint8)


def _per_block(layer: PackedLayer, number: Tensor) -> Tensor:
    """A number of the grid as [out, in / 32]."""
    return spread(number, layer.scheme.granularity, layer.tensor.shape, BLOCK)
