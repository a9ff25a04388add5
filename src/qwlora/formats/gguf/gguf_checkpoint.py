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
not read, because transformers does not read them; see `rope_config.py`.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

from qwlora.errors import ExportError, SourceError, foreign_as, listed
from qwlora.formats.checkpoint import ShownCheckpoint
from qwlora.formats.gguf.blocks import TYPES, Blocks, decode_blocks, to_quantized
from qwlora.formats.gguf.gguf_file import TOKENS, GgufFile
from qwlora.formats.gguf.rope_config import FACTORS, warn_of_positions
from qwlora.formats.gguf.tensor_names import GgufOrigin, Reordering, find_reordering, gguf_origins
from qwlora.formats.meta_model import empty_model, place_name, tensor_at, tensor_places
from qwlora.grid.quantized_tensor import QuantizedTensor

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class GgufCheckpoint(ShownCheckpoint):
    """A GGUF file.

    Args:
        path: the file.

    Attributes:
        config: the configuration that transformers reads from the file's metadata.
        model: the model that the metadata describe, without data.

    Raises:
        SourceError: the file is damaged, transformers does not know its architecture, a parameter
            of the model is missing, a tensor is not a parameter of it, or the type of a tensor is
            not supported (the message lists all such tensors).
    """

    config: PretrainedConfig
    model: PreTrainedModel
    folder = None

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._origins = self._placed(self._mapped(path))
        refused = {
            source: kind
            for origin in self._origins.values()
            for source, kind in self._kinds(origin).items()
            if kind not in TYPES.keys() | FLOATS.keys()
        }
        if refused:
            kinds = ", ".join(sorted(set(refused.values())))
            raise self.file.error(
                f"{listed([f'{name} ({kind})' for name, kind in refused.items()])}: {kinds} cannot "
                "be expressed as integer codes with scales. Use a file with "
                f"{', '.join(TYPES)} or floats ({', '.join(FLOATS)})"
            )
        warn_of_positions(self.file, self.config)

    @classmethod
    def check_names(cls, path: str | Path) -> None:
        """Refuse a file with tensors that its model does not have; transformers silently skips
        them.

        Raises:
            SourceError: there are such tensors (the message lists them), or the file is damaged.
        """
        cls.__new__(cls)._mapped(path)

    def _mapped(self, path: str | Path) -> dict[str, GgufOrigin]:
        """Open the file, and find the stored tensors of each parameter of its model."""
        self.file = GgufFile(path)
        settings, self.config = self._read_config()
        try:
            self.model = empty_model(self.config)
        except SourceError as error:
            raise self.file.error(str(error).replace("config.json", "its metadata")) from error
        origins, unknown = gguf_origins(self.file, settings, self.model)
        if unknown := [name for name in unknown if not FACTORS.fullmatch(name)]:
            raise self.file.error(
                f"{listed(unknown)}: not in {type(self.model).__name__}, which its metadata "
                f"describe ({self.config.num_hidden_layers} layers). Update transformers, or "
                "download the file again"
            )
        return origins

    def names(self) -> list[str]:
        return list(self._origins)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        origin = self._origin(name)
        kinds = self._kinds(origin)
        kind = kinds[origin.sources[0]]
        if len(set(kinds.values())) > 1:
            parts = ", ".join(f"{source} ({kind})" for source, kind in kinds.items())
            raise self.file.error(
                f"parameter {name!r} is stored in several tensors of different types: "
                f"{parts}. Use a file that has the same type for them"
            )
        return self._floats(origin, FLOATS[kind]) if kind in FLOATS else self._integers(origin)

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The names of the stored tensors of one parameter."""
        return self._origins[name].sources

    def stored_rows(self, name: str) -> tuple[str, Int64[Tensor, " out"]]:
        """The stored tensor of a matrix [out, in], and the stored row of each of its rows.

        Raises:
            SourceError: there is no such parameter.
            ExportError: it is stored in several tensors, transposed, or with its columns moved.
        """
        origin = self._origin(name)
        shapes = [self.file.tensors[source].shape for source in origin.sources]
        order = find_reordering(origin, shapes, 1, self._what(origin))
        if len(origin.sources) > 1 or order.transposed or order.columns is not None:
            raise ExportError(
                f"{name!r} is stored in {listed(list(origin.sources))} in another form than its "
                "rows, so nothing can be put in its place"
            )
        return origin.sources[0], order.rows.flatten()

    def _origin(self, name: str) -> GgufOrigin:
        if name not in self._origins:
            raise self.file.error(
                f"{name!r} is not a parameter of {type(self.model).__name__} (tied parameters "
                "have the first of their names)"
            )
        return self._origins[name]

    def _kinds(self, origin: GgufOrigin) -> dict[str, str]:
        return {source: self.file.tensors[source].kind for source in origin.sources}

    def _what(self, origin: GgufOrigin) -> str:
        source, kind = next(iter(self._kinds(origin).items()))
        return f"{str(self.file.path)!r}: tensor {source!r} ({kind}, parameter {origin.target!r})"

    def _floats(self, origin: GgufOrigin, dtype: torch.dtype) -> Tensor:
        stored = {
            source: self.file.raw(source).view(dtype).view(self.file.tensors[source].shape)
            for source in origin.sources
        }
        with foreign_as(
            SourceError,
            f"{self._what(origin)}: transformers' conversion of this tensor fails",
            "download the file again",
        ):
            value = origin.convert(stored)
        self._check_shape(origin, tuple(value.shape))
        return value.to(torch.promote_types(dtype, torch.float32))

    def _integers(self, origin: GgufOrigin) -> QuantizedTensor:
        what, kinds = self._what(origin), self._kinds(origin)
        parts = [decode_blocks(kind, self.file.raw(source)) for source, kind in kinds.items()]
        shapes = [tuple(part.codes.shape) for part in parts]
        if len({shape[-1] for shape in shapes}) > 1:
            raise SourceError(
                f"{what}: the tensors of this parameter have rows of different "
                f"lengths ({', '.join(map(str, shapes))}); download the file again"
            )
        reordering = find_reordering(origin, shapes, parts[0].size, what)
        blocks = _reorder(reordering, parts)
        shape = tuple(blocks.codes.shape)
        self._check_shape(origin, shape[::-1] if reordering.transposed else shape)
        return to_quantized(blocks, what)

    def _check_shape(self, origin: GgufOrigin, shape: tuple[int, ...]) -> None:
        expected = self._expected(origin)
        if shape != expected:
            raise SourceError(
                f"{self._what(origin)} has shape {list(shape)}, but {list(expected)} in the model "
                "that the file's metadata describe; download the file again"
            )

    def _expected(self, origin: GgufOrigin) -> tuple[int, ...]:
        path, _, key = origin.target.rpartition(".")
        tensor = tensor_at(self.model, (path, key))
        assert tensor is not None
        return tuple(tensor.shape)

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

    def _placed(self, origins: dict[str, GgufOrigin]) -> dict[str, GgufOrigin]:
        """The same in the model's order, tied tensors once, after checking that nothing is
        missing."""
        result: dict[str, GgufOrigin] = {}
        missing = []
        for name, places in tensor_places(self.model).items():
            copies = [origins[alias] for alias in map(place_name, places) if alias in origins]
            if not copies:
                missing.append(name)
                continue
            if any(not self._same(copies[0], copy) for copy in copies[1:]):
                both = listed([source for copy in copies for source in copy.sources])
                raise self.file.error(
                    f"{both} hold different values, but the model that its metadata describe ties "
                    "them"
                )
            result[name] = copies[0]
        if missing:
            raise self.file.error(
                f"{listed(missing)}: missing from the file, but needed by "
                f"{type(self.model).__name__}, which its metadata describe; download it again"
            )
        for name, origin in result.items():
            values = sum(math.prod(self.file.tensors[source].shape) for source in origin.sources)
            shape = self._expected(origin)
            if values != math.prod(shape):
                raise self.file.error(
                    f"parameter {name!r} is {list(shape)}, but its tensors "
                    f"({', '.join(origin.sources)}) have {values} values. The file is damaged; "
                    "download it again"
                )
        return result

    def _same(self, a: GgufOrigin, b: GgufOrigin) -> bool:
        return len(a.sources) == len(b.sources) and all(
            self.file.tensors[x].kind == self.file.tensors[y].kind
            and torch.equal(self.file.raw(x), self.file.raw(y))
            for x, y in zip(a.sources, b.sources, strict=True)
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
