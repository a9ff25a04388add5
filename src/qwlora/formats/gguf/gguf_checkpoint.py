"""A GGUF file as a `Checkpoint`: the integers that llama.cpp computes with, under the names of the Hugging Face model.

    checkpoint = GgufCheckpoint("model.gguf")
    checkpoint.read("model.layers.0.mlp.down_proj.weight").dequantize()     # what the gguf package gives for it, bit for bit

The configuration and the names come from transformers' own loading code, so whatever architecture that knows is read; what it does to values (rows of q and k
in another order, norms less one, experts joined) is done here too, to codes where the tensor is integers. `gguf_blocks.py` says which grid each type becomes.
Types F32, F16, BF16 and F64 are floats (float32, and float64 for the last).

A tensor is read when it is asked for; the file is mapped, so nothing else of it is in memory. A tied output head comes once, as in the file.

Scaled rotary positions are not read by transformers, and not here: see `gguf_rope.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

from qwlora.errors import SourceError
from qwlora.formats.gguf.blocks import TYPES, Blocks, decode_blocks, to_quantized
from qwlora.formats.gguf.gguf_file import TOKENS, GgufFile
from qwlora.formats.gguf.rope_config import FACTORS, warn_of_positions
from qwlora.formats.gguf.tensor_names import Making, Move, makings, moved
from qwlora.formats.meta_model import empty_model, place_name, tensor_at, tensor_places
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.messages import listed

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class GgufCheckpoint:
    """A GGUF file.

    Args:
        path: the file.

    Attributes:
        config: the configuration that transformers reads from the file's metadata.

    Raises:
        SourceError: the file is damaged, transformers does not know its architecture, a parameter of the model is missing, a tensor is no parameter of it, or a
            tensor is of a type that no grid expresses (all are named).
    """

    config: PretrainedConfig

    def __init__(self, path: str | Path):
        self._makings = self._placed(self._found(path))
        self._refuse_types()
        warn_of_positions(self.file, self.config)

    @classmethod
    def check_names(cls, path: str | Path) -> None:
        """Refuse a file with tensors that its model has no place for; transformers skips them silently.

        Raises:
            SourceError: there are such tensors (they are named), or the file is damaged.
        """
        cls.__new__(cls)._found(path)

    def _found(self, path: str | Path) -> dict[str, Making]:
        """What makes each parameter of the model that the metadata describe."""
        self.file = GgufFile(path)
        settings, self.config = self._read_config()
        try:
            self._model = empty_model(self.config, len(self.file.tensors))
        except SourceError as error:
            raise self.file.error(str(error).replace("config.json", "its metadata")) from error
        found, unknown = makings(self.file, settings, self._model)
        self._refuse_unknown(unknown)
        return found

    def names(self) -> list[str]:
        """Parameters in the model's order, a tied tensor once."""
        return list(self._makings)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """One parameter: float32 (float64 if the file has that), or integers `[out, in]`, `[experts, out, in]` if the file holds integers for it.

        Raises:
            SourceError: there is no such parameter, its stored tensors are of several types, or its numbers fit no grid.
        """
        if name not in self._makings:
            raise self.file.error(
                f"{name!r} is no parameter of {type(self._model).__name__} (of tied ones, the first counts)"
            )
        making = self._makings[name]
        return self._floats(making) if self._kind(making) in FLOATS else self._integers(making)

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The file's names of what makes one parameter."""
        return self._makings[name].sources

    @property
    def model(self) -> PreTrainedModel:
        """The model that the metadata build, without data."""
        return self._model

    def _kind(self, making: Making) -> str:
        kinds = {source: self.file.tensors[source].kind for source in making.sources}
        if len(set(kinds.values())) > 1:
            parts = ", ".join(f"{source} ({kind})" for source, kind in kinds.items())
            raise self.file.error(
                f"parameter {making.target!r} is made of {parts}, and one tensor has one grid; take a file that has one type for them"
            )
        return next(iter(kinds.values()))

    def _what(self, making: Making) -> str:
        source = making.sources[0]
        return f"{str(self.file.path)!r}: tensor {source!r} ({self.file.tensors[source].kind}, parameter {making.target!r})"

    def _floats(self, making: Making) -> Tensor:
        kind = FLOATS[self._kind(making)]
        stored = {
            source: self.file.raw(source).view(kind).view(self.file.tensors[source].shape)
            for source in making.sources
        }
        try:
            made = making.convert(stored)
        except Exception as error:  # a file's numbers reach any line of any conversion
            raise SourceError(
                f"{self._what(making)}: transformers' conversion of this tensor fails: {error or type(error).__name__}"
            ) from error
        self._check_shape(making, tuple(made.shape))
        return made.to(torch.promote_types(kind, torch.float32))

    def _integers(self, making: Making) -> QuantizedTensor:
        parts = [
            decode_blocks(self._kind(making), self.file.raw(source)) for source in making.sources
        ]
        shapes = [tuple(part.codes.shape) for part in parts]
        if len({shape[-1] for shape in shapes}) > 1:
            raise SourceError(
                f"{self._what(making)}: the tensors that make this parameter have rows of different lengths ({', '.join(map(str, shapes))})"
            )
        move = moved(making, shapes, parts[0].size, self._what(making))
        blocks = _apply(move, parts)
        shape = tuple(blocks.codes.shape)
        self._check_shape(making, shape[::-1] if move.turned else shape)
        return to_quantized(blocks, self._what(making))

    def _check_shape(self, making: Making, shape: tuple[int, ...]) -> None:
        expected = self._expected(making.target)
        if shape != expected:
            raise SourceError(
                f"{self._what(making)} has shape {list(shape)}, but {list(expected)} in the model that the file's metadata describe"
            )

    def _expected(self, target: str) -> tuple[int, ...]:
        path, _, key = target.rpartition(".")
        tensor = tensor_at(self._model, (path, key))
        assert tensor is not None
        return tuple(tensor.shape)

    def _read_config(self) -> tuple[dict[str, Any], PretrainedConfig]:
        """The configuration's settings as transformers reads them, and the configuration."""
        tokens = self.file.metadata.get(TOKENS)
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = self.file.path.resolve()
                if (
                    self.file.architecture not in GGUF_CONFIG_ARCHS
                ):  # those are read quickly, and want the vocabulary
                    path = Path(folder, "header.gguf")
                    path.write_bytes(self.file.without_contents())
                settings, _ = PretrainedConfig.get_config_dict(
                    str(path.parent), gguf_file=path.name
                )
            if (
                settings.get("vocab_size") == 0 and tokens
            ):  # the length of the vocabulary, which was left out
                settings["vocab_size"] = tokens
            return settings, CONFIG_MAPPING[settings["model_type"]].from_dict(dict(settings))
        except Exception as error:  # a file's values reach any line of any configuration's code
            raise self.file.error(
                f"transformers reads no configuration from its metadata (architecture {self.file.architecture!r}): {error or type(error).__name__}"
            ) from error

    def _refuse_unknown(self, unknown: list[str]) -> None:
        if others := [name for name in unknown if not FACTORS.fullmatch(name)]:
            raise self.file.error(
                f"{listed(others)}: no parameter of {type(self._model).__name__}, which its metadata "
                f"describe ({self.config.num_hidden_layers} layers); it needs a newer transformers, or is "
                "damaged"
            )

    def _placed(self, found: dict[str, Making]) -> dict[str, Making]:
        """In the model's order, each tied tensor once."""
        result, missing = {}, []
        for name, places in tensor_places(self._model).items():
            copies = [found[alias] for alias in map(place_name, places) if alias in found]
            if not copies:
                missing.append(name)
                continue
            if len(copies) > 1 and not self._same(copies):
                both = listed([source for copy in copies for source in copy.sources])
                raise self.file.error(
                    f"{both} hold different values, but the model that its metadata describe ties them"
                )
            result[name] = copies[0]
        if missing:
            raise self.file.error(
                f"{listed(missing)}: missing from the file, and needed by {type(self._model).__name__}, which its metadata describe; fetch it again"
            )
        for name, making in result.items():
            values = sum(
                torch.Size(self.file.tensors[source].shape).numel() for source in making.sources
            )
            shape = torch.Size(self._expected(making.target))
            if values != shape.numel():
                stored = ", ".join(making.sources)
                raise self.file.error(
                    f"parameter {name!r} is {list(shape)}, but its tensors ({stored}) have {values} values; the file is damaged"
                )
        return result

    def _same(self, copies: list[Making]) -> bool:
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
            for making in self._makings.values()
            for source in making.sources
            if self.file.tensors[source].kind not in TYPES.keys() | FLOATS.keys()
        }
        if refused:
            kinds = ", ".join(sorted(set(refused.values())))
            raise self.file.error(
                f"{listed([f'{name} ({kind})' for name, kind in refused.items()])}: no grid of codes and scales expresses {kinds}; take a file of "
                f"{', '.join(TYPES)} or floats ({', '.join(FLOATS)})"
            )


def _apply(move: Move, parts: list[Blocks]) -> Blocks:
    """The rows and blocks of columns of `parts`, one after another, where `move` says they belong."""
    size, result = parts[0].size, []
    for pieces in zip(*(part.parts() for part in parts), strict=True):
        flat_pieces = [
            piece.flatten(0, -2) if piece.ndim > 1 else piece.unsqueeze(0) for piece in pieces
        ]
        flat = torch.cat(flat_pieces) if len(flat_pieces) > 1 else flat_pieces[0]
        if not torch.equal(move.rows.flatten(), torch.arange(len(flat))):
            flat = flat[move.rows.flatten()]
        if move.columns is not None:
            flat = flat[
                :,
                move.columns
                if flat.shape[1] == len(move.columns)
                else move.columns[::size] // size,
            ]
        result.append(flat.view(*move.rows.shape, flat.shape[1]))
    return parts[0].with_parts(result)
