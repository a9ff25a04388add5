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

import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

from qwlora.errors import ExportError, SourceError
from qwlora.formats.checkpoint import ShownCheckpoint
from qwlora.formats.gguf.blocks import TYPES, Blocks, decode_blocks, to_quantized
from qwlora.formats.gguf.gguf_file import TOKENS, GgufFile
from qwlora.formats.gguf.rope_config import FACTORS, warn_of_positions
from qwlora.formats.gguf.tensor_names import GgufOrigin, Reordering, find_reordering, gguf_origins
from qwlora.formats.meta_model import empty_model, place_name, tensor_at, tensor_places
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.messages import listed

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class GgufCheckpoint(ShownCheckpoint):
    """A GGUF file.

    Args:
        path: the file.

    Attributes:
        config: the configuration that transformers reads from the file's metadata.

    Raises:
        SourceError: the file is damaged, transformers does not know its architecture, a parameter
            of the model is missing, a tensor is not a parameter of it, or the type of a tensor is
            not supported (the message lists all such tensors).
    """

    config: PretrainedConfig
    folder = None

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._origins = self._placed(self._found(path))
        self._refuse_types()
        warn_of_positions(self.file, self.config)

    @classmethod
    def check_names(cls, path: str | Path) -> None:
        """Refuse a file with tensors that its model does not have; transformers silently skips
        them.

        Raises:
            SourceError: there are such tensors (the message lists them), or the file is damaged.
        """
        cls.__new__(cls)._found(path)

    def _found(self, path: str | Path) -> dict[str, GgufOrigin]:
        """The stored tensors of each parameter of the model that the metadata describe."""
        self.file = GgufFile(path)
        settings, self.config = self._read_config()
        try:
            self._model = empty_model(self.config)
        except SourceError as error:
            raise self.file.error(str(error).replace("config.json", "its metadata")) from error
        found, unknown = gguf_origins(self.file, settings, self._model)
        self._refuse_unknown(unknown)
        return found

    def names(self) -> list[str]:
        """Parameter names in the model's order, tied tensors once."""
        return list(self._origins)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Read one parameter: float32 or float64, or integers `[out, in]` or `[experts, out, in]`
        if it is stored as integers.

        Raises:
            SourceError: there is no such parameter, its stored tensors have different types, or no
                encoding can express its values.
        """
        if name not in self._origins:
            raise self.file.error(
                f"{name!r} is not a parameter of {type(self._model).__name__} (tied parameters "
                "have the first of their names)"
            )
        origin = self._origins[name]
        return self._floats(origin) if self._kind(origin) in FLOATS else self._integers(origin)

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The names of the stored tensors of one parameter."""
        return self._origins[name].sources

    def stored_rows(self, name: str) -> tuple[str, Int64[Tensor, " out"]]:
        """The stored tensor of a matrix [out, in], and the stored row of each of its rows.

        Raises:
            SourceError: there is no such parameter.
            ExportError: it is stored in several tensors, transposed, or with its columns moved.
        """
        if name not in self._origins:
            raise self.file.error(f"{name!r} is not a parameter of {type(self._model).__name__}")
        origin = self._origins[name]
        shapes = [self.file.tensors[source].shape for source in origin.sources]
        found = find_reordering(origin, shapes, 1, self._what(origin))
        if len(origin.sources) > 1 or found.transposed or found.columns is not None:
            raise ExportError(
                f"{name!r} is stored in {listed(list(origin.sources))} in another form than its "
                "rows, so nothing can be put in its place"
            )
        return origin.sources[0], found.rows.flatten()

    @property
    def model(self) -> PreTrainedModel:
        """The model that the metadata describe, without data."""
        return self._model

    def _kind(self, origin: GgufOrigin) -> str:
        kinds = {source: self.file.tensors[source].kind for source in origin.sources}
        if len(set(kinds.values())) > 1:
            parts = ", ".join(f"{source} ({kind})" for source, kind in kinds.items())
            raise self.file.error(
                f"parameter {origin.target!r} is stored in several tensors of different types: "
                f"{parts}. Use a file that has the same type for them"
            )
        return next(iter(kinds.values()))

    def _what(self, origin: GgufOrigin) -> str:
        source = origin.sources[0]
        kind = self.file.tensors[source].kind
        return f"{str(self.file.path)!r}: tensor {source!r} ({kind}, parameter {origin.target!r})"

    def _floats(self, origin: GgufOrigin) -> Tensor:
        kind = FLOATS[self._kind(origin)]
        stored = {
            source: self.file.raw(source).view(kind).view(self.file.tensors[source].shape)
            for source in origin.sources
        }
        try:
            made = origin.convert(stored)
        except Exception as error:  # bad values can fail anywhere in a conversion
            raise SourceError(
                f"{self._what(origin)}: transformers' conversion of this tensor fails: "
                f"{error or type(error).__name__}"
            ) from error
        self._check_shape(origin, tuple(made.shape))
        return made.to(torch.promote_types(kind, torch.float32))

    def _integers(self, origin: GgufOrigin) -> QuantizedTensor:
        parts = [
            decode_blocks(self._kind(origin), self.file.raw(source)) for source in origin.sources
        ]
        shapes = [tuple(part.codes.shape) for part in parts]
        if len({shape[-1] for shape in shapes}) > 1:
            raise SourceError(
                f"{self._what(origin)}: the tensors of this parameter have rows of different "
                f"lengths ({', '.join(map(str, shapes))}); download the file again"
            )
        reordering = find_reordering(origin, shapes, parts[0].size, self._what(origin))
        blocks = _reorder(reordering, parts)
        shape = tuple(blocks.codes.shape)
        self._check_shape(origin, shape[::-1] if reordering.transposed else shape)
        return to_quantized(blocks, self._what(origin))

    def _check_shape(self, origin: GgufOrigin, shape: tuple[int, ...]) -> None:
        expected = self._expected(origin.target)
        if shape != expected:
            raise SourceError(
                f"{self._what(origin)} has shape {list(shape)}, but {list(expected)} in the model "
                "that the file's metadata describe; download the file again"
            )

    def _expected(self, target: str) -> tuple[int, ...]:
        path, _, key = target.rpartition(".")
        tensor = tensor_at(self._model, (path, key))
        assert tensor is not None
        return tuple(tensor.shape)

    def _read_config(self) -> tuple[dict[str, Any], PretrainedConfig]:
        """The settings that transformers reads from the metadata, and the configuration made of
        them."""
        tokens = self.file.metadata.get(TOKENS)
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = self.file.path.resolve()
                # for GGUF_CONFIG_ARCHS, transformers is fast and needs the vocabulary
                if self.file.architecture not in GGUF_CONFIG_ARCHS:
                    path = Path(folder, "header.gguf")
                    path.write_bytes(self.file.without_contents())
                settings, _ = PretrainedConfig.get_config_dict(
                    str(path.parent), gguf_file=path.name
                )
            if (
                settings.get("vocab_size") == 0 and tokens
            ):  # `without_contents` removed the vocabulary
                settings["vocab_size"] = tokens
            return settings, CONFIG_MAPPING[settings["model_type"]].from_dict(dict(settings))
        except Exception as error:  # bad values can fail anywhere in a configuration class
            raise self.file.error(
                "transformers cannot read a configuration from its metadata (architecture "
                f"{self.file.architecture!r}): {error or type(error).__name__}"
            ) from error

    def _refuse_unknown(self, unknown: list[str]) -> None:
        if others := [name for name in unknown if not FACTORS.fullmatch(name)]:
            raise self.file.error(
                f"{listed(others)}: not in {type(self._model).__name__}, which its metadata "
                "describe "
                f"({self.config.num_hidden_layers} layers). Update transformers, or download the "
                "file again"
            )

    def _placed(self, found: dict[str, GgufOrigin]) -> dict[str, GgufOrigin]:
        """The same in the model's order, tied tensors once, after checking that nothing is
        missing."""
        result, missing = {}, []
        for name, places in tensor_places(self._model).items():
            copies = [found[alias] for alias in map(place_name, places) if alias in found]
            if not copies:
                missing.append(name)
                continue
            if len(copies) > 1 and not self._same(copies):
                both = listed([source for copy in copies for source in copy.sources])
                raise self.file.error(
                    f"{both} hold different values, but the model that its metadata describe ties "
                    "them"
                )
            result[name] = copies[0]
        if missing:
            raise self.file.error(
                f"{listed(missing)}: missing from the file, but needed by "
                f"{type(self._model).__name__}, which its metadata describe; download it again"
            )
        for name, origin in result.items():
            values = sum(
                torch.Size(self.file.tensors[source].shape).numel() for source in origin.sources
            )
            shape = torch.Size(self._expected(origin.target))
            if values != shape.numel():
                stored = ", ".join(origin.sources)
                raise self.file.error(
                    f"parameter {name!r} is {list(shape)}, but its tensors ({stored}) have "
                    f"{values} values. The file is damaged; download it again"
                )
        return result

    def _same(self, copies: list[GgufOrigin]) -> bool:
        stored = [
            [(self.file.tensors[source].kind, self.file.raw(source)) for source in copy.sources]
            for copy in copies
        ]
        return all(
            len(other) == len(stored[0])
            and all(
                a[0] == b[0] and torch.equal(a[1], b[1])
                for a, b in zip(stored[0], other, strict=True)
            )
            for other in stored[1:]
        )

    def _refuse_types(self) -> None:
        refused = {
            source: self.file.tensors[source].kind
            for origin in self._origins.values()
            for source in origin.sources
            if self.file.tensors[source].kind not in TYPES.keys() | FLOATS.keys()
        }
        if refused:
            kinds = ", ".join(sorted(set(refused.values())))
            raise self.file.error(
                f"{listed([f'{name} ({kind})' for name, kind in refused.items()])}: {kinds} cannot "
                "be expressed as integer codes with scales. Use a file with "
                f"{', '.join(TYPES)} or floats ({', '.join(FLOATS)})"
            )


def _reorder(reordering: Reordering, parts: list[Blocks]) -> Blocks:
    """Concatenate `parts` and reorder their rows and blocks of columns as `reordering` says."""
    size, result = parts[0].size, []
    for pieces in zip(*(part.parts() for part in parts), strict=True):
        flat_pieces = [
            piece.flatten(0, -2) if piece.ndim > 1 else piece.unsqueeze(0) for piece in pieces
        ]
        flat = torch.cat(flat_pieces) if len(flat_pieces) > 1 else flat_pieces[0]
        if not torch.equal(reordering.rows.flatten(), torch.arange(len(flat))):
            flat = flat[reordering.rows.flatten()]
        if reordering.columns is not None:
            flat = flat[
                :,
                reordering.columns
                if flat.shape[1] == len(reordering.columns)
                else reordering.columns[::size] // size,
            ]
        result.append(flat.view(*reordering.rows.shape, flat.shape[1]))
    return parts[0].with_parts(result)
