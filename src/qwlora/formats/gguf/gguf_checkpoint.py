"""A GGUF file as a `Checkpoint`: llama.cpp's integers, under the Hugging Face model's parameter
names.

    checkpoint = GgufCheckpoint("model.gguf")
    checkpoint.read("model.layers.0.mlp.down_proj.weight").dequantize()

The dequantized values equal those of the `gguf` package bit for bit. Configuration and names come
from the loading code of transformers, so every architecture that it supports can be read. What it
does to values (reorder the rows of q and k, subtract one from norms, join experts) is also applied
to integers, if it only moves rows or blocks. `blocks.py` says which encoding each GGUF type
becomes. Tensors of type F32, F16 and BF16 are read as float32, those of type F64 as float64.

transformers has two kinds of conversions: for some architectures the same as for its own
checkpoints (`integrations.gguf`), for the others a processor class per architecture
(`modeling_gguf_pytorch_utils`). Here both become `Origin`s. Float tensors are converted directly.
For integers, the function is probed to learn how it reorders values: its input is filled with row
numbers, then with column numbers, and the result shows where each row and column came from
(`Reordering`). A conversion that does anything else to values, like subtracting one, is refused for
integers.

The file is memory-mapped, and each tensor is read when it is asked for. Scaled rotary positions are
not read, because transformers does not read them unless its code for the architecture does (gpt-oss
has it); a warning says so. In the file, they are

    ARCH.rope.scaling.type, .factor, ...      position scaling (linear, yarn, longrope);
                                              ARCH.rope.scale_linear in old files
    rope_freqs.weight, rope_factors_*.weight  factors of the rotary frequencies
"""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Int64
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from qwlora.errors import ExportError, QwloraWarning, SourceError, foreign_as, listed
from qwlora.formats.checkpoint import MappedCheckpoint, Origin, origins
from qwlora.formats.gguf.blocks import TYPES, decode_blocks, to_quantized
from qwlora.formats.gguf.gguf_file import TOKENS, GgufFile
from qwlora.formats.meta_model import empty_model
from qwlora.grid.encoding import QuantizedTensor

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_ROPE_FACTORS = re.compile(r"(.*\.)?rope_(freqs|factors_long|factors_short)\.weight")
FIRST = 1000
"""The number given to row 0 and column 0 in a probe. Results below it were computed, not moved."""


class GgufCheckpoint(MappedCheckpoint):
    """A GGUF file.

    Args:
        path: the file.
        as_floats: accept types that only transformers reads, as floats.

    Attributes:
        config: the configuration that transformers reads from the file's metadata.
        model: the model that the metadata describe, without data.

    Raises:
        SourceError: the file is damaged, transformers does not know its architecture, a parameter
            of the model is missing, a tensor is not a parameter of it, or the type of a tensor is
            not supported (the message lists all such tensors).
    """

    described_in = "its metadata"

    def __init__(self, path: str | Path, as_floats: bool = False):
        self.path = Path(path)
        self.file = GgufFile(path)
        settings, self.config = self._read_config()
        try:  # without buffers, so that damaged sizes allocate nothing
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
        if len(set(kinds.values())) > 1:
            parts = ", ".join(f"{source} ({kind})" for source, kind in kinds.items())
            raise self._error(
                f"parameter {origin.target!r} is stored in several tensors of different types: "
                f"{parts}. Use a file that has the same type for them"
            )
        return self._floats(origin, FLOATS[kind]) if kind in FLOATS else self._integers(origin)

    def stored_rows(self, name: str, count: int = 0) -> tuple[str, Int64[Tensor, " out"]]:
        """The stored tensor of a matrix [out, in], and the stored row of each of its rows.

        Raises:
            SourceError: there is no such parameter.
            ExportError: it is stored in several tensors, transposed, or with its columns moved.
        """
        origin = self._origins_of(name)[0]
        shapes = [self.file.tensors[source].shape for source in origin.sources]
        order = find_reordering(origin, shapes, 1, self._what(origin))
        if len(origin.sources) > 1 or order.transposed or order.columns is not None:
            raise ExportError(
                f"{name!r} is stored in {listed(list(origin.sources))} in another form than its "
                "rows, so nothing can be put in its place"
            )
        return origin.sources[0], order.rows.flatten()

    def _kinds(self, origin: Origin) -> dict[str, str]:
        return {source: self.file.tensors[source].kind for source in origin.sources}

    def _what(self, origin: Origin) -> str:
        source, kind = next(iter(self._kinds(origin).items()))
        return f"{str(self.file.path)!r}: tensor {source!r} ({kind}, parameter {origin.target!r})"

    def _floats(self, origin: Origin, dtype: torch.dtype) -> Tensor:
        stored = {
            source: self.file.raw(source).view(dtype).view(self.file.tensors[source].shape)
            for source in origin.sources
        }
        with foreign_as(
            SourceError,
            f"{self._what(origin)}: transformers' conversion of this tensor fails",
            "download the file again",
        ):
            return origin.convert(stored).to(torch.promote_types(dtype, torch.float32))

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
        """The settings that transformers reads from the metadata, and the configuration made of
        them."""
        architecture, tokens = self.file.architecture, self.file.metadata.get(TOKENS)
        what = "transformers cannot read a configuration from its metadata (architecture"
        with (
            foreign_as(SourceError, f"{str(self.file.path)!r}: {what} {architecture!r})"),
            tempfile.TemporaryDirectory() as folder,
        ):
            path = self.file.path.resolve()
            # for GGUF_CONFIG_ARCHS, transformers is fast and needs the vocabulary
            if architecture not in GGUF_CONFIG_ARCHS:
                path = Path(folder, "header.gguf")
                path.write_bytes(self.file.without_contents())
            settings, _ = PretrainedConfig.get_config_dict(str(path.parent), gguf_file=path.name)
            if settings.get("vocab_size") == 0 and tokens:  # `without_contents` removed them
                settings["vocab_size"] = tokens
            kind, key = (
                CONFIG_MAPPING[settings["model_type"]],
                f"{architecture}.attention.key_length",
            )
            if hasattr(kind, "head_dim") and key in self.file.metadata:  # Qwen3: else 128
                settings.setdefault("head_dim", self.file.metadata[key])
            return settings, kind.from_dict(dict(settings))

    def _warn_of_positions(self) -> None:
        """Warn if the file scales positions and the configuration does not."""
        file = self.file
        parameters = getattr(self.config.get_text_config(), "rope_parameters", None) or {}
        unread = [name for name in file.tensors if _ROPE_FACTORS.fullmatch(name)]
        by_layer_type = [part for part in parameters.values() if isinstance(part, dict)]
        if all(
            part.get("rope_type", "default") == "default" for part in (parameters, *by_layer_type)
        ):
            prefix = (
                f"{file.architecture}.rope.scal"  # scaling.type, scaling.factor ..., scale_linear
            )
            scaling = {key: value for key, value in file.metadata.items() if key.startswith(prefix)}
            kind = scaling.get(f"{prefix}ing.type", "linear")  # llama.cpp's own default
            factor = scaling.get(f"{prefix}ing.factor", scaling.get(f"{prefix}e_linear", 0))
            if kind != "none" and not (kind == "linear" and factor in (0, 1)):
                unread = [f"{key} = {value}" for key, value in scaling.items()] + unread
        if unread:
            warnings.warn(
                f"{str(file.path)!r} scales rotary positions ({listed(unread)}). llama.cpp "
                "applies this, but transformers does not read it from a GGUF "
                f"file (rope_parameters {parameters or None}), so results differ, mostly on long "
                "texts. Give the model's Hugging Face folder as the source, "
                "or, in Python, set config.rope_parameters of open_checkpoint(...) before "
                "load_precomputed",
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
    """Which stored rows and columns the rows and columns of a parameter come from.

    Args:
        rows: for each row of the parameter, the index of the stored row, counted through all
            sources.
        columns: the same for columns; None if they keep their order.
        transposed: whether the parameter is stored as [in, out]; `rows` and `columns` refer to
            [out, in].
    """

    rows: Int[Tensor, "*rows"]
    columns: Int[Tensor, " in"] | None
    transposed: bool


def gguf_origins(
    file: GgufFile, config: Mapping[str, Any], model: PreTrainedModel
) -> tuple[dict[str, Origin], list[str]]:
    """Find the stored tensors of each parameter.

    Args:
        file: the open file.
        config: the configuration as transformers reads it from the file.
        model: the model without data.

    Returns:
        The origin of each parameter, and the stored tensors that belong to no parameter and that
        transformers does not ignore.

    Raises:
        SourceError: transformers does not know the architecture, or the file's tensors do not fit
            its conversions.
    """
    architecture, where = file.architecture, repr(str(file.path))
    with foreign_as(
        SourceError, f"{where}: transformers cannot map the tensors of {architecture!r}"
    ):  # bad values can fail anywhere in a conversion
        if not is_gguf_arch_supported(architecture):
            return _Processor(file, config, model).origins(file)
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        mapping = get_gguf_conversion_mapping(architecture, model.config)
        return origins(model, shapes, where, mapping)


class _Processor:
    """The conversion of an architecture for which transformers has a processor class."""

    def __init__(self, file: GgufFile, config: Mapping[str, Any], model: PreTrainedModel):
        kind = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
        self.processor = kind(config=dict(config))
        self.mapping = get_gguf_hf_weights_map(_OuterModules(model), self.processor)

    def origins(self, file: GgufFile) -> tuple[dict[str, Origin], list[str]]:
        """As `gguf_origins`."""
        sources: dict[str, list[str]] = {}
        unknown = []
        for name, tensor in file.tensors.items():
            targets = self._targets(name, tensor.shape)
            unknown += [] if targets else [name]
            for target in targets:
                sources.setdefault(target, []).append(name)
        return {
            target: Origin(target, tuple(names), self._parameters)
            for target, names in sources.items()
        }, unknown

    def _targets(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """The parameters that the processor makes from a stored tensor."""
        if name in self.mapping and len(shape) < 3:
            return [self.mapping[name]]
        probe = torch.zeros(1, dtype=torch.int8)
        try:
            try:
                return [*self._parameters({name: probe.expand(*shape[:-1], min(2, shape[-1]))})]
            except (ValueError, IndexError):  # needs the real number of columns
                return [*self._parameters({name: probe.expand(shape)})]
        except KeyError:  # experts of a block that the model does not have
            return []

    def _parameters(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert `tensors` as transformers does when it loads a file."""
        parsed: dict[str, Any] = {"tensors": {}}
        for stored, tensor in tensors.items():
            if tensor.is_floating_point():
                tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            weights, name, _ = self.processor.process(
                weights=tensor.numpy(),
                name=stored,
                tensor_key_mapping=self.mapping,
                parsed_parameters=parsed,
            )
            if name in self.mapping:
                parsed["tensors"][self.mapping[name]] = torch.from_numpy(weights)
        return parsed["tensors"]


class _OuterModules:
    """A model whose `ModuleList`s appear to have no children.

    transformers builds a table of all tensor names for each module that it visits; visiting every
    layer would take very long.
    """

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
    """How `origin.convert` reorders the rows and columns of its sources.

    The probe first uses tensors with two columns, which is fast. Conversions that fail because they
    need the real number of columns are probed again with it.

    Args:
        origin: the conversion to probe.
        shapes: the shape of each source.
        block: the number of columns that share a scale.
        what: the tensor, for messages.

    Raises:
        SourceError: the conversion does more than move rows and whole blocks of columns.
    """
    width = shapes[0][-1]
    try:
        return _probed(origin, [(*shape[:-1], min(2, width)) for shape in shapes], block, what)
    except SourceError:
        raise
    except Exception:  # see `gguf_origins`
        with foreign_as(SourceError, f"{what}: transformers' conversion of this tensor fails"):
            return _probed(origin, [(*shape[:-1], width) for shape in shapes], block, what)


def _probed(origin: Origin, shapes: list[tuple[int, ...]], block: int, what: str) -> Reordering:
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
    if (
        width % block
        or bool((starts % block).any())
        or not torch.equal(order, (starts + torch.arange(block)).flatten())
    ):
        raise SourceError(
            f"{what}: transformers moves columns of this tensor out of their blocks of {block}, "
            "which share a scale. Use a file with smaller blocks for this tensor"
        )
    return Reordering((row - FIRST).long(), order, transposed)


def _is_order(numbers: Tensor, count: int) -> bool:
    """Whether `numbers` is a permutation of 0 to `count - 1`."""
    return numbers.numel() == count and torch.equal(
        numbers.flatten().sort().values, torch.arange(count, dtype=numbers.dtype)
    )
