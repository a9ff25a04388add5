"""The safetensors files of a Hugging Face folder, read through the `safetensors` library.

The files are `model.safetensors`, or the shards in `model.safetensors.index.json`. If neither
exists, the folder's only safetensors file or index is used, whatever its name (AutoGPTQ writes
`gptq_model-4bit-128g.safetensors`).

Opening reads and checks the headers only. The checks use little time and memory even if a damaged
header claims huge sizes, and their messages name the bad tensor. `read` returns a view of the
memory-mapped file, or a copy if `mapped` is False. With copies, the pages of a file larger than
memory do not accumulate in the process.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwlora.errors import SourceError
from qwlora.messages import listed

HEADER_LIMIT_BYTES = 100_000_000  # a limit of the format
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "I16": 16,
    "U16": 16,
    "I32": 32,
    "U32": 32,
    "I64": 64,
    "U64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}
BITS |= {
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: str
    shape: tuple[int, ...]


class SafetensorsFiles:
    """The tensors in the safetensors files of `folder`, by their stored names.

    Args:
        folder: a Hugging Face folder.
        stem: the usual name of the file, without what follows (`model`.safetensors).
        mapped: return views of the memory-mapped files instead of copies.

    Raises:
        SourceError: there are no safetensors files, or several and none has the usual name; the
            index refers to a file that is missing or outside the folder; a tensor is missing or
            duplicated; a file is truncated or malformed.
    """

    def __init__(self, folder: str | Path, stem: str = "model", mapped: bool = True):
        self.folder, self._backend = Path(folder), "mmap" if mapped else "pread"
        self._single, self._index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        self._handles: dict[Path, Any] = {}
        self._entries = self._read_entries()

    def names(self) -> list[str]:
        """All tensor names, in the order in which they are stored."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """The tensor's type as safetensors names it: `F32`, `BF16`, `I32` ..."""
        return self._entry(name).dtype

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            SourceError: there is no such tensor, or torch does not have its type.
        """
        file = self._entry(name).file
        try:
            if file not in self._handles:
                self._handles[file] = safe_open(file, framework="pt", backend=self._backend)
            return self._handles[file].get_tensor(name)
        except (
            OSError,
            SafetensorError,
            ValueError,
            RuntimeError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise SourceError(f"{str(file)!r}: tensor {name!r} cannot be read: {error}") from error

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise SourceError(
                f"{str(self.folder)!r}: there is no tensor {name!r} in its safetensors files"
            ) from None

    def _read_entries(self) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        for file, names in self._listed_files().items():
            held = read_header(file)
            for name in held if names is None else names:
                if name not in held:
                    raise SourceError(
                        f"{str(file)!r}: the index lists tensor {name!r} in this file, but it is "
                        "not there; download the model again"
                    )
                entries[name] = held[name]
            if names is not None and (extra := sorted(held.keys() - set(names))):
                raise SourceError(
                    f"{str(file)!r}: tensor {extra[0]!r} is in this file, but the index does not "
                    f"list it there ({len(extra)} such tensors); download the model again"
                )
        return entries

    def _listed_files(self) -> dict[Path, list[str] | None]:
        """Each file with the tensors that the index lists in it; None if there is no index."""
        if (self.folder / self._index).is_file():
            return self._indexed_files(self.folder / self._index)
        if (self.folder / self._single).is_file():
            return {self.folder / self._single: None}
        if index := self._only("*.safetensors.index.json"):
            return self._indexed_files(index)
        if single := self._only("*.safetensors"):
            return {single: None}
        if old := sorted(p.name for p in self.folder.glob("pytorch_model*.bin")):
            raise SourceError(
                f"{str(self.folder)!r} holds {old[0]}, a pickle file, which can run code when it "
                "is read. Save the model as safetensors first (model.save_pretrained)"
            )
        raise SourceError(
            f"{str(self.folder)!r} has neither {self._single} nor {self._index}. "
            "Give the folder of a Hugging Face checkpoint"
        )

    def _only(self, pattern: str) -> Path | None:
        """The file that matches `pattern`, or None.

        Raises:
            SourceError: several files match.
        """
        found = sorted(path for path in self.folder.glob(pattern) if path.is_file())
        if len(found) > 1:
            names = listed(path.name for path in found)
            usual = self._index if pattern.endswith(".json") else self._single
            raise SourceError(
                f"{str(self.folder)!r} has neither {self._single} nor {self._index}, but several "
                f"other files: {names}. Rename the right one to {usual}, or remove the others"
            )
        return found[0] if found else None

    def _indexed_files(self, index: Path) -> dict[Path, list[str] | None]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(v, str) for v in weight_map.values()
        ):
            raise SourceError(
                f"{str(index)!r}: weight_map must give the file name of each tensor; download it "
                "again"
            )
        files: dict[Path, list[str] | None] = {}
        for name, file in weight_map.items():
            if (
                file in ("", ".", "..")
                or set(file) & set("/\\\0")
                or not file.endswith(".safetensors")
            ):
                raise SourceError(
                    f"{str(index)!r}: tensor {name!r} is listed in {file!r}, which is not a "
                    ".safetensors file in this folder"
                )
            if not (self.folder / file).is_file():
                raise SourceError(
                    f"{str(index)!r}: file {file!r}, which should contain tensor {name!r}, is "
                    "missing; download it too"
                )
            names = files.setdefault(self.folder / file, [])
            assert names is not None
            names.append(name)
        return files


def check_shards_are_inside(folder: Path) -> None:
    """Refuse an index that names files outside of its folder, which transformers would read.

    Raises:
        SourceError: with the index, the tensor and the file.
    """
    for index in sorted(folder.glob("*.index.json")):
        weight_map = read_json(index).get("weight_map")
        for name, file in weight_map.items() if isinstance(weight_map, dict) else ():
            path = os.path.normpath(str(file))
            if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
                raise SourceError(
                    f"{str(index)!r}: tensor {name!r} is listed in {file!r}, outside of the "
                    "model's folder. Put the file into the folder and its plain name into the index"
                )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SourceError: the file cannot be read, is not a JSON object, or a key occurs twice.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            f"{str(path)!r} cannot be read: {error or type(error).__name__}"
        ) from error
    if not isinstance(content, dict):
        raise SourceError(f"{str(path)!r} is not a JSON object")
    return content


def read_header(file: Path) -> dict[str, _Entry]:
    """Read the header of a safetensors file and check it against the file's size.

    Raises:
        SourceError: the file is truncated or malformed; the message names the tensor.
    """
    where = repr(str(file))
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
            if length is None or length > min(size - 8, HEADER_LIMIT_BYTES):
                raise SourceError(
                    f"{where} is {size} bytes long, but its header claims {length}: it is "
                    "truncated, or not a safetensors file; download it again"
                )
            header = json.loads(stream.read(length), object_pairs_hook=_distinct)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{where}: the header cannot be read: {error or type(error).__name__}"
        ) from error
    if not isinstance(header, dict):
        raise SourceError(f"{where}: the header is not a JSON object; download it again")
    header.pop("__metadata__", None)
    return {
        name: _checked_entry(file, name, entry, size - 8 - length) for name, entry in header.items()
    }


def _checked_entry(file: Path, name: str, entry: Any, data_bytes: int) -> _Entry:
    where = f"{str(file)!r}: tensor {name!r}"
    dtype, shape, offsets = (
        (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if isinstance(entry, dict)
        else (None, None, None)
    )
    if not isinstance(dtype, str) or dtype not in BITS:
        raise SourceError(
            f"{where} has type {dtype!r}, which is not a safetensors type; download it again"
        )
    if (
        not _naturals(shape)
        or not _naturals(offsets)
        or shape is None
        or offsets is None
        or len(offsets) != 2
    ):
        raise SourceError(
            f"{where} has shape {shape!r} and data_offsets {offsets!r}, which must be lists of "
            "non-negative integers; download it again"
        )
    begin, end = offsets
    if end > data_bytes:
        raise SourceError(
            f"{where} ends at byte {end}, but the file has {data_bytes} bytes of data: it is "
            "truncated; download it again"
        )
    if (
        len(shape) > 64
        or max(shape, default=0) > 2**62
        or math.prod(shape) * BITS[dtype] != 8 * (end - begin)
    ):
        raise SourceError(
            f"{where} has shape {shape} of {dtype}, which does not fill the {end - begin} bytes of "
            "its data; download it again"
        )
    return _Entry(file, dtype, tuple(shape))


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"key {repeated[0]!r} occurs twice")
    return dict(pairs)
