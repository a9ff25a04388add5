"""Open a model's files by their headers: what is stored for each tensor, and how to read one.

`inspect_model.py` describes what this finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qwlora.encodings.model import BlockOrder
from qwlora.errors import SourceError
from qwlora.formats.aimet import AimetCheckpoint
from qwlora.formats.base_files import RECORD, BaseCheckpoint
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.meta_model import empty_model, place_name
from qwlora.formats.model_source import quantization_of
from qwlora.formats.open_checkpoint import open_checkpoint
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Scheme


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file, from its header.

    Args:
        part: its role in the layer, such as `weight` or `qweight`.
        dtype: as the format names it.
    """

    part: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class OpenedModel:
    """The files of one model.

    Args:
        kind: the format, in words.
        tensors: the stored tensors of each parameter or buffer of the model.
        read: reads one of these by name.
        transposed: returns the names of parameters that the model stores as `[in, out]`. Slow, so
            it is called only to compare floats with integers.
        fingerprint: of a QWLoRA base.
        schemes: grid and shape of the tensors whose headers state them.
    """

    kind: str
    tensors: Mapping[str, tuple[TensorHeader, ...]]
    read: Callable[[str], Tensor | QuantizedTensor]
    transposed: Callable[[], frozenset[str]]
    fingerprint: str | None = None
    schemes: Mapping[str, tuple[Scheme, tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class AimetFile:
    """An encodings file for a float model, and how to read it; see `open_checkpoint`."""

    path: Path
    keep_float: tuple[str, ...] = ()
    block_order: BlockOrder | None = None


def open_files(path: Path, encodings: AimetFile | None = None) -> OpenedModel:
    """Open a base, a Hugging Face folder of floats or integers, or a GGUF file.

    Args:
        encodings: the AIMET encodings that quantize the float model at `path`.

    Raises:
        SourceError: `path` is none of these or cannot be read, or `encodings` is given although the
            model is quantized already.
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
            f"{str(path)!r} is neither a base, nor a folder with config.json, nor a .gguf file"
        )
    method, _ = quantization_of(path)
    return _open_folder(path, method)


def _open_base(folder: Path) -> OpenedModel:
    base = BaseCheckpoint(folder)
    stored = {
        name: tuple(_stored(base.files, found, found.rpartition(".")[2]) for found in parts)
        for name, parts in base.stored.items()
    }
    return OpenedModel(
        "QWLoRA base",
        stored,
        base.read,
        lambda: _transposed(empty_model(base.config)),
        base.record["fingerprint"],
        base.schemes(),
    )


def _open_aimet(folder: Path, encodings: AimetFile) -> OpenedModel:
    checkpoint = open_checkpoint(
        folder, encodings.path, keep_float=encodings.keep_float, block_order=encodings.block_order
    )
    assert isinstance(checkpoint, AimetCheckpoint)
    floats = checkpoint.floats
    return OpenedModel(
        "float checkpoint with AIMET encodings",
        _stored_tensors(floats),
        checkpoint.read,
        lambda: _transposed(floats.model),
        schemes=checkpoint.schemes(),
    )


def _open_folder(folder: Path, method: str | None) -> OpenedModel:
    if method is None:
        files = SafetensorsFiles(folder)
        try:
            checkpoint = open_checkpoint(folder)
        except SourceError:  # not a language model; its headers can still be shown
            return OpenedModel(
                "float checkpoint",
                {name: (_stored(files, name, "weight"),) for name in files.names()},
                files.read,
                frozenset,
            )
    else:
        checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    model = checkpoint.model
    return OpenedModel(
        "float checkpoint" if method is None else f"{method} checkpoint",
        _stored_tensors(checkpoint),
        checkpoint.read,
        lambda: _transposed(model),
    )


def _stored_tensors(checkpoint: FolderCheckpoint) -> dict[str, tuple[TensorHeader, ...]]:
    """The stored tensors of each parameter in a folder."""
    files = checkpoint.files
    raw: dict[str, list[str]] = {}
    for name in files.names():
        raw.setdefault(name.rpartition(".")[0], []).append(name)
    tensors = {}
    for name in checkpoint.names():
        names = [
            found
            for stored in checkpoint.stored_names(name)
            for found in _sources_of(stored, files, raw)
        ]
        tensors[name] = tuple(_stored(files, found, found.rpartition(".")[2]) for found in names)
    return tensors


def _open_gguf(path: Path) -> OpenedModel:
    from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint

    checkpoint = GgufCheckpoint(path)
    in_file, tensors = checkpoint.file.tensors, {}
    for name in checkpoint.names():
        sources = [in_file[stored] for stored in checkpoint.stored_names(name)]
        tensors[name] = tuple(
            TensorHeader("weight", source.kind, source.shape, source.size_bytes)
            for source in sources
        )
    model = checkpoint.model
    return OpenedModel("GGUF file", tensors, checkpoint.read, lambda: _transposed(model))


def _sources_of(stored: str, files: SafetensorsFiles, raw: Mapping[str, list[str]]) -> list[str]:
    """The tensors in the files from which a reader makes `stored`: itself, or all of its layer
    except the bias."""
    return (
        [stored]
        if stored in files
        else [name for name in raw.get(stored.rpartition(".")[0], []) if not name.endswith(".bias")]
    )


def _transposed(model: nn.Module) -> frozenset[str]:
    """Names of the parameters stored as `[in, out]`: weights of Conv1D, and experts of modules with
    `is_transposed` (see `nn/packed_experts.py`)."""
    found = set()
    for path, module in model.named_modules():
        keys = ["weight"] if isinstance(module, Conv1D) else []
        if getattr(module, "is_transposed", False):
            keys += [
                key
                for key, parameter in module._parameters.items()
                if parameter is not None and parameter.ndim == 3
            ]
        found |= {place_name((path, key)) for key in keys}
    return frozenset(found)


def _stored(files: SafetensorsFiles, name: str, part: str) -> TensorHeader:
    return TensorHeader(part, files.dtype(name), files.shape(name), files.nbytes(name))
