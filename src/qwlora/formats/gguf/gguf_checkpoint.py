"""A GGUF file as a `Checkpoint`: llama.cpp's integers, under the Hugging Face model's parameter
names.

    checkpoint = GgufCheckpoint("model.gguf")
    checkpoint.read("model.layers.0.mlp.down_proj.weight").dequantize()

The dequantized values equal those of the `gguf` package bit for bit. Configuration and names come
from the loading code of transformers, so every architecture that it supports can be read. What it
does to values (reorder the rows of q and k, subtract one from norms, join experts) is also applied
to integers, if it only moves rows or blocks. `blocks.py` says which encoding each GGUF type
becomes. Tensors of type F32, F16 and BF16 are read as float32, those of type F64 as float64.

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
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

from qwlora.errors import ExportError, QwloraWarning, SourceError, foreign_as, listed
from qwlora.formats.checkpoint import MappedCheckpoint, Origin
from qwlora.formats.gguf.blocks import TYPES, Blocks, decode_blocks, to_quantized
from qwlora.formats.gguf.gguf_file import TOKENS, GgufFile
from qwlora.formats.gguf.tensor_names import Reordering, find_reordering, gguf_origins
from qwlora.formats.meta_model import empty_model
from qwlora.grid.encoding import QuantizedTensor

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_ROPE_FACTORS = re.compile(r"(.*\.)?rope_(freqs|factors_long|factors_short)\.weight")


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
        try:
            self.model = empty_model(self.config)
        except SourceError as error:
            raise self._error(str(error).replace("config.json", "its metadata")) from error
        origins, unknown = gguf_origins(self.file, settings, self.model)
        self._place_(origins, [name for name in unknown if not _ROPE_FACTORS.fullmatch(name)])
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

    def stored_rows(self, name: str) -> tuple[str, Int64[Tensor, " out"]]:
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
        shapes = [tuple(part.codes.shape) for part in parts]
        if len({shape[-1] for shape in shapes}) > 1:
            raise SourceError(
                f"{what}: the tensors of this parameter have rows of different "
                f"lengths ({', '.join(map(str, shapes))}); download the file again"
            )
        reordering = find_reordering(origin, shapes, parts[0].size, what)
        return to_quantized(_reorder(reordering, parts), what)

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
            return settings, CONFIG_MAPPING[settings["model_type"]].from_dict(dict(settings))

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


def _reorder(reordering: Reordering, parts: list[Blocks]) -> Blocks:
    """Concatenate `parts` and reorder their rows and blocks of columns as `reordering` says."""
    size, tensors = parts[0].size, []
    rows, columns = reordering.rows, reordering.columns
    for pieces in zip(*(part.parts() for part in parts), strict=True):
        matrices = [piece.view(-1, piece.shape[-1]) for piece in pieces]
        flat = torch.cat(matrices) if len(matrices) > 1 else matrices[0]
        if not torch.equal(rows.flatten(), torch.arange(len(flat))):
            flat = flat[rows.flatten()]
        if columns is not None:
            by_block = flat.shape[1] != len(columns)
            flat = flat[:, columns[::size] // size if by_block else columns]
        tensors.append(flat.view(*rows.shape, flat.shape[1]))
    return parts[0].with_parts(tensors)
