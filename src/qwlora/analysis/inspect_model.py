"""Describe a model's files tensor by tensor, without loading the model.

    bits = 8 * stored bytes / weights      scales, offsets, minima and group indices included
    SQNR = 10 log10(sum w^2 / sum (w - w_hat)^2) dB
                                           w_hat from these files, w from another source

Sizes come from headers. Where no header states the grid, one tensor is read for each combination of
stored types and shapes; comparing with another source reads all of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from qwlora.errors import SourceError
from qwlora.formats.base_files import BaseCheckpoint
from qwlora.formats.checkpoint import Checkpoint
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.model_source import fetch, quantization_of
from qwlora.formats.open_checkpoint import open_checkpoint
from qwlora.grid.encoding import QuantizedTensor, sqnr_db
from qwlora.grid.scheme import Scheme

if TYPE_CHECKING:
    from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorView:
    """One tensor of a model."""

    name: str
    shape: tuple[int, ...]  # of the values; `[out, in]` for integers
    grid: str  # the scheme, without symmetry if the tensor was not read; or the dtype of floats
    bytes: int  # all stored bytes, including scales and offsets
    sqnr_db: float | None = None  # against another source, if one was given; infinite if equal

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def is_integers(self) -> bool:
        return self.grid.startswith("int") and " " in self.grid

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights if self.weights else 0.0

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
    """The content of a model's files."""

    kind: str  # the format, in words
    source: str
    tensors: tuple[TensorView, ...]
    fingerprint: str | None = None  # of a QWLoRA base

    @property
    def totals(self) -> dict[str, dict[str, Any]]:
        """Sizes of `all` tensors, and of those that are `integers`."""
        parts = {"all": self.tensors, "integers": [t for t in self.tensors if t.is_integers]}
        totals = {}
        for name, tensors in parts.items():
            count, stored = sum(t.weights for t in tensors), sum(t.bytes for t in tensors)
            bits = 8 * stored / count if count else 0.0
            totals[name] = {"weights": count, "bytes": stored, "bits_per_weight": bits}
        return totals

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        content = {key: getattr(self, key) for key in ("kind", "source", "fingerprint", "totals")}
        return content | {"tensors": [tensor.to_json() for tensor in self.tensors]}


def inspect_source(source: str, against: str | None = None) -> Inspection:
    """Describe `source`: a base, a Hugging Face folder of floats or integers, or a GGUF file.

    Args:
        source: a path, or `package:NAME/PATH`.
        against: another source, usually the float model, to compute the SQNR of every common
            tensor. Reads both in full, one tensor at a time.
    """
    files = _open(fetch(source).path)
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
    """The files of one model, opened by their headers. Schemes are those that headers state."""

    kind: str
    reader: Checkpoint | SafetensorsFiles  # of one parameter or buffer by name
    headers: Mapping[str, tuple[_Header, ...]]
    schemes: Mapping[str, tuple[Scheme, tuple[int, ...]]] = field(default_factory=dict)
    fingerprint: str | None = None


def _open(path: Path) -> _ModelFiles:
    schemes: dict[str, tuple[Scheme, tuple[int, ...]]] = {}
    fingerprint, reader = None, None
    try:
        reader = open_checkpoint(path)
    except SourceError:
        is_config = path.is_dir() and (path / "config.json").is_file()
        if not is_config or quantization_of(path)[0] is not None:
            raise
    # The headers of a model that is no language model can still be shown.
    if reader is None:
        kind, files = "float checkpoint", SafetensorsFiles(path)
        stored = {name: [name] for name in files.names()}
    elif isinstance(reader, BaseCheckpoint):
        kind, files, stored = "QWLoRA base", reader.files, reader.stored
        schemes, fingerprint = reader.schemes(), reader.record["fingerprint"]
    elif isinstance(reader, FolderCheckpoint):
        kind, files = f"{quantization_of(path)[0] or 'float'} checkpoint", reader.files
        stored = _stored(reader)
    else:
        checkpoint, headers = cast("GgufCheckpoint", reader), dict[str, tuple[_Header, ...]]()
        for name in reader.names():
            tensors = [checkpoint.file.tensors[key] for key in checkpoint.stored_names(name)]
            headers[name] = tuple(_Header("weight", t.kind, t.shape, t.size_bytes) for t in tensors)
        return _ModelFiles("GGUF file", reader, headers)
    headers = {
        name: tuple(
            _Header(p.rpartition(".")[2], files.dtype(p), files.shape(p), files.nbytes(p))
            for p in parts
        )
        for name, parts in stored.items()
    }
    return _ModelFiles(kind, files if reader is None else reader, headers, schemes, fingerprint)


def _stored(checkpoint: FolderCheckpoint) -> dict[str, list[str]]:
    """The stored tensors of each parameter: the one of its name, or all of its layer except the
    bias."""
    # A format keeps the codes, scales and offsets of a weight under names of its own in one layer.
    files = checkpoint.files
    by_layer: dict[str, list[str]] = {}
    for name in files.names():
        if not name.endswith(".bias"):
            by_layer.setdefault(name.rpartition(".")[0], []).append(name)
    stored = {}
    for name in checkpoint.names():
        sources = checkpoint.stored_names(name)
        parts = ([s] if s in files else by_layer.get(s.rpartition(".")[0], []) for s in sources)
        stored[name] = [part for layer in parts for part in layer]
    return stored


def _views(files: _ModelFiles) -> list[TensorView]:
    alike = Counter(header for name, header in files.headers.items() if name not in files.schemes)
    grids_read: dict[tuple[_Header, ...], tuple[tuple[int, ...], str]] = {}
    views = []
    for name, headers in files.headers.items():
        if name in files.schemes:
            scheme, shape = files.schemes[name]
            shape_and_grid = shape, str(scheme)
        elif len(headers) == 1 and headers[0].dtype in FLOATS:
            shape_and_grid = headers[0].shape, FLOATS[headers[0].dtype]
        else:
            if headers not in grids_read:
                value = files.reader.read(name)
                if isinstance(value, QuantizedTensor):
                    shape, grid = value.codes.shape, str(value.encoding.scheme)
                    # The offsets of each tensor decide whether it is symmetric, and those of the
                    # others were not read.
                    if alike[headers] > 1:
                        grid = re.sub(" a?symmetric", "", grid)
                else:
                    shape, grid = value.shape, str(value.dtype).removeprefix("torch.")
                grids_read[headers] = tuple(shape), grid
            shape_and_grid = grids_read[headers]
        views.append(TensorView(name, *shape_and_grid, sum(part.bytes for part in headers)))
    return views


def _compared(view: TensorView, files: _ModelFiles, reference: _ModelFiles) -> TensorView:
    if view.name not in reference.headers:
        return view
    ours, theirs = files.reader.read(view.name), reference.reader.read(view.name)
    pairs = [(w_hat, w) for w_hat in _layouts(ours, theirs) for w in _layouts(theirs, ours)]
    ratios = [
        sqnr_db(float(w.double().square().sum()), float((w - w_hat).double().square().sum()))
        for w_hat, w in pairs
        if w_hat.shape == w.shape
    ]
    if not ratios:
        shapes = [list(tensor.shape) for tensor in pairs[0]]
        raise SourceError(
            f"{view.name} has shape {shapes[0]} in one source and {shapes[1]} in the other. Give "
            "two versions of the same model"
        )
    grid = str(ours.encoding.scheme) if isinstance(ours, QuantizedTensor) else view.grid
    return replace(view, grid=grid, sqnr_db=max(ratios))


def _layouts(value: Tensor | QuantizedTensor, other: Tensor | QuantizedTensor) -> list[Tensor]:
    """The values of `value` as floats, in each layout that it may have."""
    # Next to integers [out, in], floats may be [in, out] (Conv1D, some fused experts) or a kernel:
    # the better fit is right.
    if isinstance(value, QuantizedTensor):
        return [value.dequantize()]
    values = value.to(torch.float32)
    if not isinstance(other, QuantizedTensor) or values.ndim < 2:
        return [values]
    return [values, values.mT, values.flatten(1)]
