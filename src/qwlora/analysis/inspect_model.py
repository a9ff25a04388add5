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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwlora.analysis.model_files import AimetFile, OpenedModel, TensorHeader, open_files
from qwlora.errors import SourceError
from qwlora.formats.model_source import fetch
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.sqnr import sqnr_db
from qwlora.progress import Track, untracked

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
                "weights": weights(v),
                "bytes": size_bytes(v),
                "bits_per_weight": bits_per_weight(v),
            }
            for name, v in parts.items()
        }
        return {
            "kind": self.kind,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "totals": totals,
            "tensors": [t.to_json() for t in self.tensors],
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
    track: Track = untracked,
    encodings: AimetFile | None = None,
) -> Inspection:
    """Describe `source`: a base, a Hugging Face folder of floats or integers, or a GGUF file.

    Args:
        source: a path, or `package:NAME/PATH`.
        against: another source, usually the float model, to compute the SQNR of every common
            tensor. Reads both in full, one tensor at a time.
        encodings: an AIMET encodings file for the float model in `source`.

    Raises:
        SourceError: a source has another format or cannot be read, or no tensor is in both.
        EncodingsFileError: the encodings do not fit the model.
    """
    opened = open_files(path_of(source), encodings)
    views = _views(opened)
    if against is not None:
        other = open_files(path_of(against))
        if not opened.tensors.keys() & other.tensors.keys():
            raise SourceError(
                f"{source!r} and {against!r} have no tensor name in common. Give two versions of "
                "the same model"
            )
        views = [_compared(view, opened, other) for view in track(views, "comparing", len(views))]
    return Inspection(opened.kind, source, tuple(views), opened.fingerprint)


def path_of(source: str) -> Path:
    """The file or folder of a source, downloaded if it is a hub id.

    Raises:
        SourceError: it does not exist, or cannot be downloaded.
    """
    return fetch(source).path


def _views(opened: OpenedModel) -> list[TensorView]:
    kinds = Counter(stored for name, stored in opened.tensors.items() if name not in opened.schemes)
    known: dict[tuple[TensorHeader, ...], tuple[tuple[int, ...], str]] = {}
    views = []
    for name, stored in opened.tensors.items():
        if name in opened.schemes:
            scheme, shape = opened.schemes[name]
            found = shape, str(scheme)
        elif len(stored) == 1 and stored[0].dtype in FLOATS:
            found = stored[0].shape, FLOATS[stored[0].dtype]
        else:
            if stored not in known:
                shape, grid = _described(opened.read(name))
                known[stored] = (
                    shape,
                    grid if kinds[stored] == 1 else re.sub(" a?symmetric", "", grid),
                )
            found = known[stored]
        views.append(TensorView(name, *found, sum(part.bytes for part in stored)))
    return views


def _described(value: Tensor | QuantizedTensor) -> tuple[tuple[int, ...], str]:
    if isinstance(value, QuantizedTensor):
        return tuple(value.codes.shape), str(value.encoding.scheme)
    return tuple(value.shape), str(value.dtype).removeprefix("torch.")


def _compared(view: TensorView, opened: OpenedModel, other: OpenedModel) -> TensorView:
    if view.name not in other.tensors:
        return view
    ours, theirs = opened.read(view.name), other.read(view.name)
    w_hat = _laid_out_like(theirs, ours, opened, view.name)
    w = _laid_out_like(ours, theirs, other, view.name)
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
    other: Tensor | QuantizedTensor, value: Tensor | QuantizedTensor, opened: OpenedModel, name: str
) -> Tensor:
    """The values of `value` as floats; if `other` is integers, as `[out, in]` as well."""
    if isinstance(value, QuantizedTensor):
        return value.dequantize()
    values = value.to(torch.float32)
    if not isinstance(other, QuantizedTensor):
        return values
    values = values.mT if name in opened.transposed() else values
    return values.flatten(1) if other.codes.ndim == 2 and values.ndim > 2 else values
