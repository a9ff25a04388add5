"""The kinds of files that `inspect.py` knows, opened by their headers: what is stored for each tensor of the model, and how to read one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qwlora.encodings.model import BlockOrder
from qwlora.errors import SourceError
from qwlora.formats.aimet import AimetCheckpoint
from qwlora.formats.base_folder import RECORD
from qwlora.formats.huggingface_folder import FolderCheckpoint
from qwlora.formats.meta_model import empty_model, place_name
from qwlora.formats.open_checkpoint import open_checkpoint, quantization_of
from qwlora.formats.qwlora_base import BaseCheckpoint
from qwlora.formats.safetensors_files import BITS, SafetensorsFiles
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Scheme


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, from its header: what it is to the layer (`qweight`), its type in the format's words, its shape and its bytes."""

    part: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Opened:
    """Files of one model.

    Args:
        tensors: what is stored for each tensor of the model.
        read: one of these tensors, by name.
        turned: names of what a layer keeps `[in, out]` as floats; asked for only where floats meet integers.
        schemes: grid and shape of those that the headers tell of.
    """

    kind: str
    tensors: Mapping[str, tuple[Stored, ...]]
    read: Callable[[str], Tensor | QuantizedTensor]
    turned: Callable[[], frozenset[str]]
    fingerprint: str | None = None
    schemes: Mapping[str, tuple[Scheme, tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class AimetFile:
    """An encodings file for a folder of floats, and how to read it: see `open_checkpoint`."""

    path: Path
    keep_float: tuple[str, ...] = ()
    block_order: BlockOrder | None = None


def open_files(path: Path, encodings: AimetFile | None = None) -> Opened:
    """Whatever lies at `path`: a base, a Hugging Face folder of floats (with `encodings`, of the integers that these make of them) or integers, a GGUF file.

    Raises:
        SourceError: it is none of these, or cannot be read; encodings are given for what holds integers already.
        EncodingsFileError: the encodings do not fit the model.
    """
    if encodings is not None:
        return _open_aimet(path, encodings)
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if (path / RECORD).is_file():
        return _open_base(path)
    if not (path / "config.json").is_file():
        raise SourceError(
            f"{str(path)!r} is no base, no Hugging Face folder (it has no config.json) and no .gguf file"
        )
    method, _ = quantization_of(path)
    return _open_folder(path, method)


def _open_base(folder: Path) -> Opened:
    base = BaseCheckpoint(folder)
    stored = {
        name: tuple(_stored(base.files, found, found.rpartition(".")[2]) for found in parts)
        for name, parts in base.stored.items()
    }
    schemes = {name: (scheme, shape) for name, (_, scheme, shape) in base.layers.items()}
    return Opened(
        "QWLoRA base",
        stored,
        base.read,
        lambda: _turned(empty_model(base.config, len(stored))),
        base.record["fingerprint"],
        schemes,
    )


def _open_aimet(folder: Path, encodings: AimetFile) -> Opened:
    checkpoint = open_checkpoint(
        folder, encodings.path, keep_float=encodings.keep_float, block_order=encodings.block_order
    )
    assert isinstance(checkpoint, AimetCheckpoint)
    floats = checkpoint.floats
    return Opened(
        "float checkpoint with AIMET encodings",
        _held(floats),
        checkpoint.read,
        lambda: _turned(floats.model),
        schemes=checkpoint.schemes(),
    )


def _open_folder(folder: Path, method: str | None) -> Opened:
    if method is None:
        files = SafetensorsFiles(folder)
        try:
            checkpoint = open_checkpoint(folder)
        except (
            SourceError
        ):  # of a kind that has no language model: its headers can be shown all the same
            return Opened(
                "float checkpoint",
                {name: (_stored(files, name, "weight"),) for name in files.names()},
                files.read,
                frozenset,
            )
    else:
        checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    model = checkpoint.model
    return Opened(
        "float checkpoint" if method is None else f"{method} checkpoint",
        _held(checkpoint),
        checkpoint.read,
        lambda: _turned(model),
    )


def _held(checkpoint: FolderCheckpoint) -> dict[str, tuple[Stored, ...]]:
    """What a folder's files hold for each parameter."""
    files = checkpoint.files
    raw: dict[str, list[str]] = {}
    for name in files.names():
        raw.setdefault(name.rpartition(".")[0], []).append(name)
    tensors = {}
    for name in checkpoint.names():
        names = [
            found
            for stored in checkpoint.stored_names(name)
            for found in _behind(stored, files, raw)
        ]
        tensors[name] = tuple(_stored(files, found, found.rpartition(".")[2]) for found in names)
    return tensors


def _open_gguf(path: Path) -> Opened:
    checkpoint = open_checkpoint(path)
    held, tensors = checkpoint.file.tensors, {}  # type: ignore[attr-defined]
    for name in checkpoint.names():
        sources = [held[stored] for stored in checkpoint.stored_names(name)]  # type: ignore[attr-defined]
        tensors[name] = tuple(
            Stored("weight", source.kind, source.shape, source.size_bytes) for source in sources
        )
    model = checkpoint.model  # type: ignore[attr-defined]
    return Opened("GGUF file", tensors, checkpoint.read, lambda: _turned(model))


def _behind(stored: str, files: SafetensorsFiles, raw: Mapping[str, list[str]]) -> list[str]:
    """The files' own tensors behind one that a reader makes: itself, or all of its layer but the bias."""
    return (
        [stored]
        if stored in files
        else [name for name in raw.get(stored.rpartition(".")[0], []) if not name.endswith(".bias")]
    )


def _turned(model: nn.Module) -> frozenset[str]:
    """Conv1D's weights, and the experts of modules that say so (see `packed/parameters.py`)."""
    found = set()
    for path, module in model.named_modules():
        turned = ["weight"] if isinstance(module, Conv1D) else []
        if getattr(module, "is_transposed", False):
            turned += [
                key
                for key, parameter in module._parameters.items()
                if parameter is not None and parameter.ndim == 3
            ]
        found |= {place_name((path, key)) for key in turned}
    return frozenset(found)


def _stored(files: SafetensorsFiles, name: str, part: str) -> Stored:
    shape, dtype = files.shape(name), files.dtype(name)
    return Stored(part, dtype, shape, math.prod(shape) * BITS[dtype] // 8)
