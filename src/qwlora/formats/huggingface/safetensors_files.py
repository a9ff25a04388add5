"""The safetensors files of a Hugging Face folder, read through the `safetensors` library.

The files are `model.safetensors`, or the shards in `model.safetensors.index.json`. If neither
exists, the folder's only safetensors file or index is used, whatever its name (AutoGPTQ writes
`gptq_model-4bit-128g.safetensors`).

Opening reads the headers only; safetensors refuses truncated and malformed ones. `read` returns a
view of the memory-mapped file, or a copy if `mapped` is False. With copies, the pages of a file
larger than memory do not accumulate in the process.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwlora.errors import SourceError
from qwlora.messages import listed


@dataclass(frozen=True)
class _Entry:
    handle: Any  # of safe_open
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

    def nbytes(self, name: str) -> int:
        """The size of the stored tensor."""
        dtype = self.dtype(name)
        bits = 8 if dtype == "BOOL" else int(re.findall(r"\d+", dtype)[0])  # BF16, F8_E4M3 ...
        return math.prod(self.shape(name)) * bits // 8

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            SourceError: there is no such tensor, or torch does not have its type.
        """
        try:
            return self._entry(name).handle.get_tensor(name)
        except (SafetensorError, RuntimeError, AttributeError, TypeError) as error:
            raise SourceError(
                f"{str(self.folder)!r}: tensor {name!r} cannot be read: {error}"
            ) from error

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
            held = read_header(file, self._backend)
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


def read_header(file: Path, backend: str = "pread") -> dict[str, _Entry]:
    """The tensors of a safetensors file, in the order in which they are stored; reads no data.

    Raises:
        SourceError: the file is truncated or malformed.
    """
    try:
        handle = safe_open(file, framework="pt", backend=backend)
        slices = {name: handle.get_slice(name) for name in handle.offset_keys()}
        return {
            name: _Entry(handle, part.get_dtype(), tuple(part.get_shape()))
            for name, part in slices.items()
        }
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"{str(file)!r} is truncated, or not a safetensors file ({error}); download it again"
        ) from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"key {repeated[0]!r} occurs twice")
    return dict(pairs)
