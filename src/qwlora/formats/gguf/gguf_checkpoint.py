"""A GGUF file as a `Checkpoint`: llama.cpp's integers, under the Hugging Face model's parameter
names.

    checkpoint = GgufCheckpoint("model.gguf")
    checkpoint.read("model.layers.0.mlp.down_proj.weight").dequantize()

The dequantized values equal those of the `gguf` package bit for bit. Configuration and names come
from the loading code of transformers, so every architecture that it supports can be read. Settings
that it does not read from the file are as in llama.cpp. Its conversions (reorder the rows of q and
k, subtract one from norms, join experts) also apply to integers if they only move rows or blocks.
F32, F16 and BF16 are read as float32, F64 as float64.

Quantized blocks are decoded into codes and scales, and become a `QuantizedTensor`:

    type         bits  block   value                            encoding
    Q4_0, Q5_0   4, 5  32      (code - 2^(bits-1)) * d          symmetric
    Q8_0         8     32      (code - 128) * d                 symmetric
    Q3_K, Q6_K   3, 6  16      (code - 2^(bits-1)) * (d * s)    symmetric
    Q4_1, Q5_1   4, 5  32      code * d + m                     float minimum
    Q2_K         2     16      code * (d * s) - dmin * t        float minimum
    Q4_K, Q5_K   4, 5  32      code * (d * s) - dmin * t        float minimum

`d`, `m` and `dmin` are float16. `s` and `t` are one integer per block: signed in Q3_K and Q6_K,
unsigned in the others. Products are rounded to float32 once, as in the `gguf` package and
llama.cpp, so values are equal bit for bit. The only exception is the sign of zero: -0.0 becomes
0.0. Source of the types: `ggml-common.h` and `ggml-quants.c` of llama.cpp.
"""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from qwlora.errors import ExportError, GridError, QwloraWarning, SourceError, foreign_as, listed
from qwlora.formats.checkpoint import (
    MappedCheckpoint,
    Origin,
    empty_model,
    find_origins,
    quantized_of,
)
from qwlora.formats.gguf.gguf_file import TOKENS, GgufFile
from qwlora.grid.encoding import QuantizedTensor

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Replaces a scale of zero, which no encoding allows; float16, as bases store scales, holds it.
CONSTANT_SCALE = 2.0**-14
_BLOCKS_AT_ONCE = 2**15
# Metadata and settings that transformers' own tables lack (5.24).
_UNREAD = {
    "attention.key_length": "head_dim",
    "context_length": "n_positions",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
# Layers of Gemma 27B, whose attention scale differs. No key of the file states the scale.
LARGEST = {"gemma2": 46, "gemma3": 62}
# Factors of the rotary frequencies, which transformers skips.
_ROPE_FACTORS = re.compile(r"(.*\.)?rope_(freqs|factors_long|factors_short)\.weight")
# The number given to row 0 and column 0 in a probe. Results below it were computed, not moved.
FIRST = 1000


class GgufCheckpoint(MappedCheckpoint):
    """A GGUF file, mapped into memory; each tensor is read when it is asked for.

    Args:
        as_floats: read every tensor as floats, also of types that have no integers here.

    Raises:
        SourceError: the file is damaged, or transformers does not know its architecture. Or tensors
            are missing, are no parameters of the model, or have an unsupported type; the message
            lists them all.
    """

    described_in = "its metadata"

    def __init__(self, path: str | Path, as_floats: bool = False):
        self.path, self.as_floats = Path(path), as_floats
        self.file = GgufFile(path)
        settings, self.config = self._read_config()
        try:
            self.model = empty_model(self.config, buffers=False)
        except SourceError as error:
            raise self._error(str(error).replace("config.json", "its metadata")) from error
        by_target, unknown = gguf_origins(self.file, settings, self.model)
        self._place_(by_target, [name for name in unknown if not _ROPE_FACTORS.fullmatch(name)])
        refused: dict[str, str] = {}
        for origin in self.origins:
            shape = self.model.get_parameter_or_buffer(origin.target).shape
            values = sum(math.prod(self.file.tensors[source].shape) for source in origin.sources)
            if values != shape.numel():
                raise self._error(
                    f"parameter {origin.target!r} is {list(shape)}, but its tensors "
                    f"({', '.join(origin.sources)}) have {values} values. The file is damaged; "
                    "download it again"
                )
            kinds = self._kinds(origin)
            refused |= {n: k for n, k in kinds.items() if k not in TYPES.keys() | FLOATS.keys()}
        if refused and not as_floats:
            raise self._error(
                f"{listed([f'{name} ({kind})' for name, kind in refused.items()])}: "
                f"{', '.join(sorted(set(refused.values())))} cannot be expressed as integer codes "
                f"with scales. Use a file with {', '.join(TYPES)} or floats ({', '.join(FLOATS)})"
            )
        self._warn_of_positions()

    def _converted(self, origin: Origin) -> Tensor | QuantizedTensor:
        kinds = self._kinds(origin)
        kind = kinds[origin.sources[0]]
        if self.as_floats:
            return self._floats(origin)
        if len(set(kinds.values())) > 1:
            parts = ", ".join(f"{source} ({kind})" for source, kind in kinds.items())
            raise self._error(
                f"parameter {origin.target!r} is stored in several tensors of different types: "
                f"{parts}. Use a file that has the same type for them"
            )
        return self._floats(origin) if kind in FLOATS else self._integers(origin)

    def stored_rows(self, name: str, count: int = 0) -> tuple[str, Int64[Tensor, " out"]]:
        """The stored tensor of a matrix [out, in], and the stored row of each of its rows.

        Raises:
            SourceError: there is no such parameter.
            ExportError: it is stored in several tensors, transposed, or with permuted columns.
        """
        # If the file ties the head to the embedding, llama.cpp looks for a separate head here.
        if name not in self._origins and name in self.model.state_dict():
            return "output.weight", torch.arange(count)
        origin = self._origins_of(name)[0]
        shapes = [self.file.tensors[source].shape for source in origin.sources]
        order = find_reordering(origin, shapes, 1, self._what(origin))
        if len(origin.sources) > 1 or order.transposed or order.columns is not None:
            raise ExportError(
                f"{name!r} is stored in {listed(list(origin.sources))} in another layout than its "
                "rows, so it cannot be replaced"
            )
        return origin.sources[0], order.rows.flatten()

    def stored_values(self, name: str, values: Tensor) -> tuple[str, Tensor]:
        """The stored tensor of a float parameter, and the content that would be read as `values`.

        Raises:
            SourceError: there is no such parameter.
            ExportError: the conversion is no permutation plus constants; see also `stored_rows`.
        """
        if values.ndim > 1:
            stored, rows = self.stored_rows(name, values.shape[:-1].numel())
            matrix = torch.empty_like(values.flatten(0, -2))
            matrix[rows] = values.flatten(0, -2)
            tensor = self.file.tensors.get(stored)
            return stored, matrix if tensor is None else matrix.view(tensor.shape)
        origin, desired = self._origins_of(name)[0], values.double().reshape(-1)
        source = origin.sources[0]
        remedy = "export this base to another target"
        # A conversion may permute a vector and add constants, as for Gemma's norms. Zeros show the
        # constants, numbers in order the permutation.
        with foreign_as(ExportError, f"{self._what(origin)} cannot be replaced", remedy):
            shift = origin.convert({source: torch.zeros_like(desired)})
            order = origin.convert({source: torch.arange(len(desired)).double()}) - shift
            vector = torch.empty_like(desired)
            vector[order.long()] = desired - shift
            restored = origin.convert({source: vector})
            is_exact = torch.allclose(restored, desired, 2**-40, 2**-40)
            if not (_is_order(order, len(desired)) and is_exact):
                raise ValueError("its conversion is not a permutation plus constants")
        return source, vector

    def _kinds(self, origin: Origin) -> dict[str, str]:
        return {source: self.file.tensors[source].kind for source in origin.sources}

    def _what(self, origin: Origin) -> str:
        source, kind = next(iter(self._kinds(origin).items()))
        return f"{str(self.file.path)!r}: tensor {source!r} ({kind}, parameter {origin.target!r})"

    def _floats(self, origin: Origin) -> Tensor:
        problem = f"{self._what(origin)}: transformers' conversion of this tensor fails"
        with foreign_as(SourceError, problem, "download the file again"):
            converted = origin.convert(
                {source: self._dequantized(source) for source in origin.sources}
            )
            return converted.to(torch.promote_types(converted.dtype, torch.float32))

    def _dequantized(self, name: str) -> Tensor:
        """A stored tensor as floats: its own, or those that the `gguf` package computes."""
        stored, raw = self.file.tensors[name], self.file.raw(name)
        if stored.kind in FLOATS:
            return raw.view(FLOATS[stored.kind]).view(stored.shape)
        # Only floats need this package, which is optional.
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        values = dequantize(raw.numpy(), GGMLQuantizationType[stored.kind])
        return torch.from_numpy(values).view(stored.shape)

    def _integers(self, origin: Origin) -> QuantizedTensor:
        what, kinds = self._what(origin), self._kinds(origin)
        parts = [decode_blocks(kind, self.file.raw(source)) for source, kind in kinds.items()]
        shapes = [tuple(codes.shape) for codes, *_ in parts]
        if len({shape[-1] for shape in shapes}) > 1:
            raise SourceError(
                f"{what}: the tensors of this parameter have rows of different "
                f"lengths ({', '.join(map(str, shapes))}); download the file again"
            )
        codes, scale, *_ = parts[0]
        size = codes.shape[-1] // scale.shape[-1]
        order = find_reordering(origin, shapes, size, what)
        joined = [_reorder(order, size, pieces) for pieces in zip(*parts, strict=True)]
        return to_quantized(kinds[origin.sources[0]], joined, what)

    def _read_config(self) -> tuple[dict[str, Any], PretrainedConfig]:
        """What transformers reads from the metadata, and the configuration made of it."""
        # transformers leaves some settings at its defaults. They become what llama.cpp has.
        architecture, tokens = self.file.architecture, self.file.metadata.get(TOKENS)
        what = "transformers cannot read a configuration from its metadata (architecture"
        with (
            foreign_as(SourceError, f"{str(self.file.path)!r}: {what} {architecture!r})"),
            tempfile.TemporaryDirectory() as folder,
        ):
            path = self.file.path.resolve()
            # transformers makes a Python object for each token of the vocabulary. A header without
            # it, and `_OuterModules`, open SmolLM2 in 1.3 s instead of 25 (docs/log/formats.md).
            # For GGUF_CONFIG_ARCHS, transformers is fast and needs the vocabulary.
            if architecture not in GGUF_CONFIG_ARCHS:
                path = Path(folder, "header.gguf")
                path.write_bytes(self.file.without_contents())
            settings, _ = PretrainedConfig.get_config_dict(str(path.parent), gguf_file=path.name)
            # 0, because `without_contents` removed them
            if settings.get("vocab_size") == 0 and tokens:
                settings["vocab_size"] = tokens
            kind, prefix = CONFIG_MAPPING[settings["model_type"]], f"{architecture}."
            metadata = {k.removeprefix(prefix): v for k, v in self.file.metadata.items()}
            for key in _UNREAD.keys() & metadata:
                if hasattr(kind, _UNREAD[key]):
                    settings.setdefault(_UNREAD[key], metadata[key])
            sliding = metadata.get("attention.sliding_window_pattern")
            if isinstance(sliding, int):  # in Gemma: one layer of so many has full attention
                sliding = [i % sliding != 0 for i in range(1, metadata["block_count"] + 1)]
            if sliding and hasattr(kind, "layer_types"):
                kinds = "full_attention", "sliding_attention"
                settings["layer_types"] = [kinds[bool(layer)] for layer in sliding]
            config: Any = kind.from_dict(dict(settings))
            padding = getattr(config, "pad_token_id", None)
            # transformers' default for Phi-3 is 32000; with a smaller vocabulary, the embedding
            # would refuse it.
            if padding is not None and padding >= getattr(config, "vocab_size", math.inf):
                config.pad_token_id = None
            heads = metadata.get("attention.head_count")
            head = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)
            rope = getattr(config, "rope_parameters", None) or {}
            if "sliding_attention" in rope and (local := metadata.get("rope.freq_base_swa")):
                rope["sliding_attention"]["rope_theta"] = local
            if "rope_theta" in rope:  # one for all layers
                rope["rope_theta"] = metadata.get("rope.freq_base", rope["rope_theta"])
                rotated = int(head * rope.get("partial_rotary_factor", 1))
                if (width := metadata.get("rope.dimension_count", rotated)) != rotated:
                    rope["partial_rotary_factor"] = width / head
            if layers := LARGEST.get(architecture):
                is_largest = config.num_hidden_layers == layers
                config.query_pre_attn_scalar = config.hidden_size // heads if is_largest else head
            return settings, config

    def _warn_of_positions(self) -> None:
        """Warn if the file scales positions and the configuration does not."""
        # transformers 5.24 reads the scaling of few architectures (gpt-oss).
        file = self.file
        parameters = getattr(self.config.get_text_config(), "rope_parameters", None) or {}
        unread = [name for name in file.tensors if _ROPE_FACTORS.fullmatch(name)]
        parts = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
        if all(part.get("rope_type", "default") == "default" for part in parts):
            rope = f"{file.architecture}.rope."
            # Old files have `scale_linear` instead of `scaling.factor`.
            keys = (f"{rope}scaling.", older := f"{rope}scale_linear")
            scaling = {key: value for key, value in file.metadata.items() if key.startswith(keys)}
            kind = scaling.get(f"{rope}scaling.type", "linear")  # llama.cpp's own default
            factor = scaling.get(f"{rope}scaling.factor", scaling.get(older, 0))
            if kind != "none" and not (kind == "linear" and factor in (0, 1)):
                unread = [f"{key} = {value}" for key, value in scaling.items()] + unread
        if unread:
            warnings.warn(
                f"{str(file.path)!r} scales rotary positions ({listed(unread)}). llama.cpp applies "
                "this, but transformers does not read it from a GGUF file (rope_parameters "
                f"{parameters or None}), so results differ, mostly on long texts. Give the model's "
                "Hugging Face folder as the source, or, in Python, set config.rope_parameters of "
                "open_checkpoint(...) before load_precomputed",
                QwloraWarning,
                stacklevel=3,
            )


def _reorder(order: Reordering, size: int, pieces: Sequence[Tensor]) -> Tensor:
    """Concatenate the pieces of one part (codes, scales or minimums) and reorder their rows and
    blocks of `size` columns."""
    matrices = [piece.view(-1, piece.shape[-1]) for piece in pieces]
    flat = torch.cat(matrices) if len(matrices) > 1 else matrices[0]
    if not torch.equal(order.rows.flatten(), torch.arange(len(flat))):
        flat = flat[order.rows.flatten()]
    if order.columns is not None:
        by_block = flat.shape[1] != len(order.columns)
        flat = flat[:, order.columns[::size] // size if by_block else order.columns]
    return flat.view(*order.rows.shape, flat.shape[1])


@dataclass(frozen=True)
class Reordering:
    """The stored row of each row of a parameter, counted through all sources, and the same for
    columns; None if they keep their order.

    `transposed`: it is stored as [in, out]; `rows` and `columns` refer to [out, in].
    """

    rows: Int[Tensor, "*rows"]
    columns: Int[Tensor, " in"] | None
    transposed: bool


def gguf_origins(
    file: GgufFile, config: Mapping[str, Any], model: PreTrainedModel
) -> tuple[dict[str, Origin], list[str]]:
    """As `find_origins`, by transformers' conversions of GGUF files. `config`: what transformers
    reads from the file."""
    architecture, where = file.architecture, repr(str(file.path))
    what = f"{where}: transformers cannot map the tensors of {architecture!r}"
    # Bad values can fail anywhere in a conversion. transformers has two kinds: for some
    # architectures the same as for its own checkpoints, for others a processor class.
    with foreign_as(SourceError, what):
        if not is_gguf_arch_supported(architecture):
            return _Processor(file, config, model).find_origins(file)
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        mapping = get_gguf_conversion_mapping(architecture, model.config)
        return find_origins(model, shapes, where, mapping)


class _Processor:
    """The conversion of an architecture for which transformers has a processor class."""

    def __init__(self, file: GgufFile, config: Mapping[str, Any], model: PreTrainedModel):
        kind = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
        self.processor = kind(config=dict(config))
        self.mapping = get_gguf_hf_weights_map(_OuterModules(model), self.processor)

    def find_origins(self, file: GgufFile) -> tuple[dict[str, Origin], list[str]]:
        sources: dict[str, list[str]] = {}
        unknown = []
        for name, tensor in file.tensors.items():
            targets = self._targets(name, tensor.shape)
            unknown += [] if targets else [name]
            for target in targets:
                sources.setdefault(target, []).append(name)
        origins = {
            target: Origin(target, tuple(names), self._parameters)
            for target, names in sources.items()
        }
        return origins, unknown

    def _targets(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """The parameters that the processor makes from a stored tensor."""
        # A matrix or vector in the table has one name. Only the processor knows the names that it
        # gives to the parts of a stack of experts; two columns of zeros are enough to ask it.
        if name in self.mapping and len(shape) < 3:
            return [self.mapping[name]]
        probe = torch.zeros(1, dtype=torch.int8)
        try:
            try:
                return [*self._parameters({name: probe.expand(*shape[:-1], min(2, shape[-1]))})]
            except (ValueError, IndexError):  # it needs the real number of columns
                return [*self._parameters({name: probe.expand(shape)})]
        except KeyError:  # experts of a block that the model does not have
            return []

    def _parameters(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert `tensors` as transformers does when it loads a file."""
        parsed: dict[str, Any] = {"tensors": {}}
        tables = {"tensor_key_mapping": self.mapping, "parsed_parameters": parsed}
        for stored, tensor in tensors.items():
            if tensor.is_floating_point():
                tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            values = tensor.numpy()
            weights, name, _ = self.processor.process(weights=values, name=stored, **tables)
            if name in self.mapping:
                parsed["tensors"][self.mapping[name]] = torch.from_numpy(weights)
        return parsed["tensors"]


class _OuterModules:
    """A model whose `ModuleList`s appear to have no children."""

    # For each module that it visits, transformers 5.24 builds a table of all tensor names. Without
    # the modules inside layers and the vocabulary, Gemma 3 270M opens in 1.4 s instead of 49
    # (docs/log/formats.md).
    def __init__(self, module: nn.Module):
        self.module, self.config = module, getattr(module, "config", None)

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def named_children(self) -> list[tuple[str, _OuterModules]]:
        if isinstance(self.module, nn.ModuleList):
            return []
        return [(name, _OuterModules(child)) for name, child in self.module.named_children()]


def find_reordering(
    origin: Origin, shapes: Sequence[tuple[int, ...]], block: int, what: str
) -> Reordering:
    """How `origin.convert` reorders the rows and columns of its sources, with these shapes.

    Raises:
        SourceError: the conversion does more than move rows and whole blocks of `block` columns,
            which share a scale.
    """
    width = shapes[0][-1]
    # Two columns are fast to probe, but some conversions fail unless they get the real number.
    try:
        return _probed(origin, [(*shape[:-1], min(2, width)) for shape in shapes], block, what)
    except SourceError:
        raise
    except Exception:  # see `gguf_origins`
        with foreign_as(SourceError, f"{what}: transformers' conversion of this tensor fails"):
            return _probed(origin, [(*shape[:-1], width) for shape in shapes], block, what)


def _probed(origin: Origin, shapes: list[tuple[int, ...]], block: int, what: str) -> Reordering:
    # Sources are filled with row numbers, then with column numbers: the result shows where each row
    # and column comes from. int32, because arithmetic that makes floats is then recognized.
    by_row, by_column, total, width = {}, {}, 0, shapes[0][-1]
    numbers = torch.arange(FIRST, FIRST + width, dtype=torch.int32)
    for source, shape in zip(origin.sources, shapes, strict=True):
        count = math.prod(shape[:-1])
        rows = torch.arange(FIRST + total, FIRST + total + count, dtype=torch.int32)
        by_row[source] = rows.view(*shape[:-1], 1).expand(shape)
        by_column[source] = numbers.expand(shape)
        total += count
    rows, columns = origin.convert(by_row), origin.convert(by_column)
    transposed = rows.ndim == 2 and rows.shape[0] == width > 1 and bool((rows[:1] == rows).all())
    if transposed:
        rows, columns = rows.T, columns.T
    row, column = rows[..., 0], columns.reshape(-1, columns.shape[-1])[0]
    only_moved = (
        rows.dtype == columns.dtype == torch.int32
        and bool((rows == row.unsqueeze(-1)).all())
        and bool((columns == column).all())
    )
    if not only_moved or not _is_order(row - FIRST, total) or not _is_order(column - FIRST, width):
        raise SourceError(
            f"{what}: transformers changes the values of this tensor, or mixes rows and columns, "
            "which is not possible on integers. Use a file with float values for this tensor"
        )
    order = (column - FIRST).long()
    if torch.equal(order, torch.arange(width)):
        return Reordering((row - FIRST).long(), None, transposed)
    starts = order[::block].unsqueeze(-1)
    of_blocks = (starts + torch.arange(block)).flatten()
    if bool((starts % block).any()) or not torch.equal(order, of_blocks):
        raise SourceError(
            f"{what}: transformers moves columns of this tensor out of their blocks of {block}, "
            "which share a scale. Use a file with smaller blocks for this tensor"
        )
    return Reordering((row - FIRST).long(), order, transposed)


def _is_order(numbers: Tensor, count: int) -> bool:
    in_order = torch.arange(count, dtype=numbers.dtype)
    return torch.equal(numbers.flatten().sort().values, in_order)


def decode_blocks(kind: str, raw: UInt8[Tensor, "*rows bytes"]) -> list[Tensor]:
    """Decode rows of the GGUF type `kind`, a key of `TYPES`.

    Returns:
        Codes `[*rows, in]`; scales `[*rows, in / size]`, which may be negative or zero; and, for
        types with one, minimums of the same shape.
    """
    _, bytes_per_block, decode = TYPES[kind]
    fields = raw.reshape(-1, bytes_per_block)
    decoded = [part.new_empty((len(fields), part.shape[-1])) for part in decode(fields[:1])]
    # Decoding makes temporary tensors of the size of its input: few blocks keep them small.
    for start in range(0, len(fields), _BLOCKS_AT_ONCE):
        chunk = slice(start, start + _BLOCKS_AT_ONCE)
        for part, piece in zip(decoded, decode(fields[chunk]), strict=True):
            part[chunk] = piece
    return [part.view(*raw.shape[:-1], -1) for part in decoded]


def to_quantized(kind: str, parts: Sequence[Tensor], what: str) -> QuantizedTensor:
    """The quantized tensor with exactly these values, which `decode_blocks` returned.

    Raises:
        SourceError: a scale or minimum is not finite, or a negative scale cannot be converted
            exactly.
    """
    bitwidth, (codes, scale, *minimum) = TYPES[kind][0], parts
    middle, is_constant, negative = 2 ** (bitwidth - 1), scale == 0, scale < 0
    size = codes.shape[-1] // scale.shape[-1]
    # GGUF allows scales of zero. Such a block is constant, whatever its codes are, so it becomes
    # the code of that constant.
    if bool(is_constant.any()):
        inside = is_constant.repeat_interleave(size, dim=-1)
        codes = codes.masked_fill(inside, 0 if minimum else middle)
        scale = scale.masked_fill(is_constant, CONSTANT_SCALE)
    offset = torch.full(scale.shape, -middle, dtype=torch.int32)
    try:
        quantized = quantized_of(bitwidth, codes, scale, *(minimum or [offset]))
    except GridError as error:
        raise SourceError(f"{what}: {error}. The file is damaged; download it again") from error
    # GGUF allows negative scales too. Next to a minimum, `quantized_of` counts codes from the other
    # end, which may round differently. No quantizer writes such blocks.
    if minimum and bool(negative.any()):
        d, m = (part.repeat_interleave(size, dim=-1) for part in (scale, *minimum))
        if not torch.equal(quantized.dequantize(), codes.float() * d + m):
            raise SourceError(
                f"{what}: {int(negative.sum())} of {scale.numel()} scales are negative, and no "
                "positive scale gives exactly the same values; "
                "quantize the float model again with llama-quantize"
            )
    return quantized


def _half(fields: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, as float32 `[*, 1]`."""
    return fields[..., start : start + 2].contiguous().view(torch.float16).to(torch.float32)


def halves(fields: UInt8[Tensor, "*rows bytes"]) -> UInt8[Tensor, "*rows codes"]:
    """All low halves of the bytes, then all high halves."""
    return torch.cat([fields & 0xF, fields >> 4], -1)


def bit_planes(
    fields: UInt8[Tensor, "*rows bytes"], count: int, width: int
) -> UInt8[Tensor, "*rows codes"]:
    """The lowest `width` bits of all bytes, then the next ones of all bytes, `count` times."""
    shifts = torch.arange(0, count * width, width, dtype=torch.uint8).unsqueeze(-1)
    return ((fields.unsqueeze(-2) >> shifts) & (2**width - 1)).flatten(-2)


def _simple(bitwidth: int, with_minimum: bool) -> Callable[[Tensor], list[Tensor]]:
    def decode(fields: Tensor) -> list[Tensor]:
        # 8 bits are signed: flipping the top bit makes codes with offset -128. Otherwise byte j has
        # code j in its low half and code j + 16 in its high half.
        codes = fields[..., -32:] ^ 0x80 if bitwidth == 8 else halves(fields[..., -16:])
        # Before them, bit j of a little-endian word is the fifth bit of code j.
        if bitwidth == 5:
            codes |= bit_planes(fields[..., -20:-16].unsqueeze(-1), 8, 1).flatten(-2) << 4
        return [codes, *(_half(fields, start) for start in (0, 2)[: 1 + with_minimum])]

    return decode


def _q2_k(fields: Tensor) -> list[Tensor]:
    pairs = fields[..., :16]
    codes = bit_planes(fields[..., 16:80].unflatten(-1, (2, 32)), 4, 2).flatten(-2)
    return [codes, _half(fields, 80) * (pairs & 0xF), -(_half(fields, 82) * (pairs >> 4))]


def _q3_k(fields: Tensor) -> list[Tensor]:
    high = bit_planes(fields[..., :32], 8, 1)
    low = bit_planes(fields[..., 32:96].unflatten(-1, (2, 32)), 4, 2).flatten(-2)
    scales = halves(fields[..., 96:104]) | bit_planes(fields[..., 104:108], 4, 2) << 4
    return [low | high << 2, _half(fields, 108) * (scales.to(torch.float32) - 32)]


def _k_scales(fields: Tensor) -> list[Tensor]:
    """The float32 scales and minimums of the eight blocks of 32 in Q4_K and Q5_K."""
    # Sixteen integers of six bits are in the twelve bytes from byte 4. The upper two bits of the
    # last eight are the top bits of the first eight bytes.
    first, second, rest = fields[..., 4:16].chunk(3, -1)
    scale = torch.cat([first & 0x3F, rest & 0xF | first >> 6 << 4], -1)
    minimum = torch.cat([second & 0x3F, rest >> 4 | second >> 6 << 4], -1)
    return [_half(fields, 0) * scale, -(_half(fields, 2) * minimum)]


def _q4_k(fields: Tensor) -> list[Tensor]:
    codes = halves(fields[..., 16:144].unflatten(-1, (4, 32))).flatten(-2)
    return [codes, *_k_scales(fields)]


def _q5_k(fields: Tensor) -> list[Tensor]:
    low = halves(fields[..., 48:176].unflatten(-1, (4, 32))).flatten(-2)
    return [low | bit_planes(fields[..., 16:48], 8, 1) << 4, *_k_scales(fields)]


def _q6_k(fields: Tensor) -> list[Tensor]:
    low = halves(fields[..., :128].unflatten(-1, (2, 64))).flatten(-2)
    high = bit_planes(fields[..., 128:192].unflatten(-1, (2, 32)), 4, 2).flatten(-2)
    return [low | high << 4, _half(fields, 208) * fields[..., 192:208].view(torch.int8)]


TYPES: dict[str, tuple[int, int, Callable[[Tensor], list[Tensor]]]] = {
    "Q4_0": (4, 18, _simple(4, False)),
    "Q4_1": (4, 20, _simple(4, True)),
    "Q5_0": (5, 22, _simple(5, False)),
    "Q5_1": (5, 24, _simple(5, True)),
    "Q8_0": (8, 34, _simple(8, False)),
    "Q2_K": (2, 84, _q2_k),
    "Q3_K": (3, 110, _q3_k),
    "Q4_K": (4, 144, _q4_k),
    "Q5_K": (5, 176, _q5_k),
    "Q6_K": (6, 210, _q6_k),
}
"""By type: bits of a code, bytes of a block, and the function that decodes uint8 `[blocks, bytes]`
into codes `[blocks, codes]`, scales `[blocks, groups]` and, where there are any, minimums."""
