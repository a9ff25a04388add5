"""Describe a model's files tensor by tensor, without loading the model.

    bits = 8 * stored bytes / weights      scales, offsets, minima and group indices included
    SQNR = 10 log10(sum w^2 / sum (w - w_hat)^2) dB
                                           w_hat from these files, w from another source

Sizes come from headers. Where no header states the grid, one tensor is read for each combination of
stored types and shapes. Whether a grid is symmetric depends on the offsets of the tensor itself, so
it is omitted for tensors that were not read; comparing with another source reads all of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from qwlora.errors import SourceError
from qwlora.formats.aimet import AimetCheckpoint
from qwlora.formats.aimet_encodings.model import BlockOrder
from qwlora.formats.base_files import BaseCheckpoint
from qwlora.formats.checkpoint import Checkpoint
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.meta_model import empty_model
from qwlora.formats.model_source import fetch, quantization_of
from qwlora.formats.open_checkpoint import open_checkpoint
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.grid.sqnr import sqnr_db

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorView:
    """One tensor of a model.

    Args:
        shape: of the values; `[out, in]` for integers.
        grid: the scheme, without symmetry if the tensor was not read; or the dtype of floats.
        bytes: all stored bytes, including scales and offsets.
        sqnr_db: SQNR against another source, if one was given; infinite if equal.
    """

    name: str
    shape: tuple[int, ...]
    grid: str
    bytes: int
    sqnr_db: float | None = None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def is_integers(self) -> bool:
        return self.grid.startswith("int") and " " in self.grid

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight([self])

    def to_json(self) -> dict[str, Any]:
        """JSON values; `exact` is true if the SQNR is infinite, which JSON cannot express."""
        exact = None if self.sqnr_db is None else math.isinf(self.sqnr_db)
        return asdict(self) | {
            "bits_per_weight": self.bits_per_weight,
            "sqnr_db": None if exact else self.sqnr_db,
            "exact": exact,
        }


@dataclass(frozen=True)
class Inspection:
    """The content of a model's files.

    Args:
        kind: the format, in words.
        source: as given.
        fingerprint: of a QWLoRA base; None for other formats.
    """

    kind: str
    source: str
    tensors: tuple[TensorView, ...]
    fingerprint: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        parts = {"all": self.tensors, "integers": [t for t in self.tensors if t.is_integers]}
        totals = {
            name: {
                "weights": weights(tensors),
                "bytes": size_bytes(tensors),
                "bits_per_weight": bits_per_weight(tensors),
            }
            for name, tensors in parts.items()
        }
        return {
            "kind": self.kind,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "totals": totals,
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }


def weights(views: Iterable[TensorView]) -> int:
    """Number of weights in these tensors."""
    return sum(view.weights for view in views)


def size_bytes(views: Iterable[TensorView]) -> int:
    """Stored bytes of these tensors."""
    return sum(view.bytes for view in views)


def bits_per_weight(views: Sequence[TensorView]) -> float:
    """Stored bits per weight, scales and offsets included."""
    return 8 * size_bytes(views) / weights(views) if weights(views) else 0.0


def inspect_source(
    source: str,
    against: str | None = None,
    encodings: Path | None = None,
    keep_float: Sequence[str] = (),
    block_order: BlockOrder | None = None,
) -> Inspection:
    """Describe `source`: a base, a Hugging Face folder of floats or integers, or a GGUF file.

    Args:
        source: a path, or `package:NAME/PATH`.
        against: another source, usually the float model, to compute the SQNR of every common
            tensor. Reads both in full, one tensor at a time.
        encodings, keep_float, block_order: an AIMET encodings file for the float model in `source`;
            see `open_checkpoint`.

    Raises:
        SourceError: a source has another format or cannot be read, or no tensor is in both.
        EncodingsFileError: the encodings do not fit the model.
    """
    files = _open(fetch(source).path, encodings, keep_float, block_order)
    views = _views(files)
    if against is not None:
        reference = _open(fetch(against).path)
        if not files.headers.keys() & reference.headers.keys():
            raise SourceError(
                f"{source!r} and {against!r} have no tensor name in common. Give two versions of "
                "the same model"
            )
        views = [_compared(view, files, reference) for view in views]
    return Inspection(files.kind, source, tuple(views), files.fingerprint)


class _Header(NamedTuple):
    """One stored tensor: its role in the layer (`qweight`), the format's name of its type."""

    part: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class _ModelFiles:
    """The files of one model, opened by their headers.

    Args:
        kind: the format, in words.
        reader: reads one parameter or buffer by name.
        headers: what is stored for each of them.
        schemes: grid and shape of the tensors whose headers state them.
        fingerprint: of a QWLoRA base.
    """

    kind: str
    reader: Checkpoint | SafetensorsFiles
    headers: Mapping[str, tuple[_Header, ...]]
    schemes: Mapping[str, tuple[Scheme, tuple[int, ...]]] = field(default_factory=dict)
    fingerprint: str | None = None

    @cached_property
    def transposed(self) -> frozenset[str]:
        """Names of the parameters stored as `[in, out]`: weights of Conv1D, and experts of modules
        with `is_transposed` (see `nn/packed_experts.py`). Slow: it builds the model."""
        if isinstance(self.reader, SafetensorsFiles):
            return frozenset()
        names = set()
        for path, module in empty_model(self.reader.config).named_modules():
            if isinstance(module, Conv1D):
                names.add(f"{path}.weight")
            if getattr(module, "is_transposed", False):
                parameters = module.named_parameters(recurse=False)
                names |= {f"{path}.{key}" for key, p in parameters if p.ndim == 3}
        return frozenset(names)


def _open(
    path: Path,
    encodings: Path | None = None,
    keep_float: Sequence[str] = (),
    block_order: BlockOrder | None = None,
) -> _ModelFiles:
    try:
        checkpoint = open_checkpoint(
            path, encodings, keep_float=keep_float, block_order=block_order
        )
    except SourceError:
        is_config = path.is_dir() and (path / "config.json").is_file()
        if encodings is not None or not is_config or quantization_of(path)[0] is not None:
            raise
        files = SafetensorsFiles(path)  # not a language model; its headers can still be shown
        stored = {name: [name] for name in files.names()}
        return _ModelFiles("float checkpoint", files, _headers(files, stored))
    if isinstance(checkpoint, BaseCheckpoint):
        headers = _headers(checkpoint.files, checkpoint.stored)
        fingerprint = checkpoint.record["fingerprint"]
        return _ModelFiles("QWLoRA base", checkpoint, headers, checkpoint.schemes(), fingerprint)
    if isinstance(checkpoint, AimetCheckpoint):
        kind, headers = "float checkpoint with AIMET encodings", _folder_headers(checkpoint.floats)
        return _ModelFiles(kind, checkpoint, headers, checkpoint.schemes())
    if isinstance(checkpoint, FolderCheckpoint):
        kind = f"{quantization_of(path)[0] or 'float'} checkpoint"
        return _ModelFiles(kind, checkpoint, _folder_headers(checkpoint))
    from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint

    assert isinstance(checkpoint, GgufCheckpoint)
    in_file = checkpoint.file.tensors
    headers = {
        name: tuple(
            _Header("weight", stored.kind, stored.shape, stored.size_bytes)
            for stored in (in_file[key] for key in checkpoint.stored_names(name))
        )
        for name in checkpoint.names()
    }
    return _ModelFiles("GGUF file", checkpoint, headers)


def _folder_headers(checkpoint: FolderCheckpoint) -> dict[str, tuple[_Header, ...]]:
    """The stored tensors of each parameter: the one of its name, or all of its layer except the
    bias."""
    files = checkpoint.files
    by_layer: dict[str, list[str]] = {}
    for name in files.names():
        if not name.endswith(".bias"):
            by_layer.setdefault(name.rpartition(".")[0], []).append(name)
    stored = {
        name: [
            part
            for source in checkpoint.stored_names(name)
            for part in (
                [source] if source in files else by_layer.get(source.rpartition(".")[0], [])
            )
        ]
        for name in checkpoint.names()
    }
    return _headers(files, stored)


def _headers(
    files: SafetensorsFiles, stored: Mapping[str, Sequence[str]]
) -> dict[str, tuple[_Header, ...]]:
    return {
        name: tuple(
            _Header(
                part.rpartition(".")[2], files.dtype(part), files.shape(part), files.nbytes(part)
            )
            for part in parts
        )
        for name, parts in stored.items()
    }


def _views(files: _ModelFiles) -> list[TensorView]:
    alike = Counter(header for name, header in files.headers.items() if name not in files.schemes)
    known: dict[tuple[_Header, ...], tuple[tuple[int, ...], str]] = {}
    views = []
    for name, headers in files.headers.items():
        if name in files.schemes:
            scheme, shape = files.schemes[name]
            shape_and_grid = shape, str(scheme)
        elif len(headers) == 1 and headers[0].dtype in FLOATS:
            shape_and_grid = headers[0].shape, FLOATS[headers[0].dtype]
        else:
            if headers not in known:
                shape, grid = _described(files.reader.read(name))
                if alike[headers] > 1:
                    grid = re.sub(" a?symmetric", "", grid)
                known[headers] = shape, grid
            shape_and_grid = known[headers]
        views.append(TensorView(name, *shape_and_grid, sum(part.bytes for part in headers)))
    return views


def _described(value: Tensor | QuantizedTensor) -> tuple[tuple[int, ...], str]:
    if isinstance(value, QuantizedTensor):
        return tuple(value.codes.shape), str(value.encoding.scheme)
    return tuple(value.shape), str(value.dtype).removeprefix("torch.")


def _compared(view: TensorView, files: _ModelFiles, reference: _ModelFiles) -> TensorView:
    if view.name not in reference.headers:
        return view
    ours, theirs = files.reader.read(view.name), reference.reader.read(view.name)
    w_hat = _laid_out_like(theirs, ours, files, view.name)
    w = _laid_out_like(ours, theirs, reference, view.name)
    if w.shape != w_hat.shape:
        raise SourceError(
            f"{view.name} has shape {list(w_hat.shape)} in one source and {list(w.shape)} in the "
            "other. Give two versions of the same model"
        )
    if isinstance(ours, QuantizedTensor):
        view = replace(view, grid=str(ours.encoding.scheme))
    noise, signal = (float(values.double().square().sum()) for values in (w - w_hat, w))
    return replace(view, sqnr_db=sqnr_db(signal, noise))


def _laid_out_like(
    pattern: Tensor | QuantizedTensor,
    value: Tensor | QuantizedTensor,
    files: _ModelFiles,
    name: str,
) -> Tensor:
    """The values of `value` as floats; as `[out, in]` if the pattern is integers."""
    if isinstance(value, QuantizedTensor):
        return value.dequantize()
    values = value.to(torch.float32)
    if not isinstance(pattern, QuantizedTensor):
        return values
    values = values.mT if name in files.transposed else values
    return values.flatten(1) if pattern.codes.ndim == 2 and values.ndim > 2 else values
