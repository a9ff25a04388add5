"""The safetensors files of a Hugging Face folder, read through the `safetensors` library.

The files are `model.safetensors`, or the shards in `model.safetensors.index.json`. If neither
exists, the folder's only safetensors file or index is used, whatever its name (AutoGPTQ writes
`gptq_model-4bit-128g.safetensors`).

Opening reads the headers only; safetensors refuses truncated and malformed ones. `read` returns a
view of the memory-mapped file, or a copy if `mapped` is False. With copies, the pages of a file
larger than memory do not accumulate in the process.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwlora.errors import SourceError, listed
from qwlora.system.strict_json import read_object

FLOATS = ("F32", "BF16", "F16", "F64")


class StoredTensor(NamedTuple):
    """A tensor of an open file, and its type as safetensors names it: `F32`, `BF16`, `I32` ..."""

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
            index refers to a file that is missing or outside the folder; a tensor is in two files;
            a file is truncated or malformed.
    """

    def __init__(self, folder: str | Path, stem: str = "model", mapped: bool = True):
        self.folder, self._backend = Path(folder), "mmap" if mapped else "pread"
        self._single, self._index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        self._tensors = self._opened()

    def names(self) -> list[str]:
        """All tensor names, in the order in which they are stored."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        """The tensor's type as safetensors names it: `F32`, `BF16`, `I32` ..."""
        return self._tensor(name).dtype

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
            return self._tensor(name).handle.get_tensor(name)
        except (SafetensorError, RuntimeError, AttributeError, TypeError) as error:
            raise SourceError(
                f"{str(self.folder)!r}: tensor {name!r} cannot be read: {error}"
            ) from error

    def check(
        self,
        name: str,
        dtypes: Collection[str],
        shape: Sequence[int],
        where: str,
        flat: bool = False,
    ) -> None:
        """Check that a tensor has this shape (`flat`: as many values) and one of these types.

        Args:
            where: the layer and its format, for messages.

        Raises:
            SourceError: it is missing, or has another type or shape.
        """
        if name not in self:
            raise SourceError(f"{where}: {name!r} is missing; download the model again")
        stored = self._tensor(name)
        fits = math.prod(stored.shape) == math.prod(shape) if flat else stored.shape == (*shape,)
        if stored.dtype not in dtypes or not fits:
            raise SourceError(
                f"{where}: {name!r} is {stored.dtype} {list(stored.shape)}, but the settings in "
                f"config.json need {' or '.join(dtypes)} {list(shape)}; download the model again"
            )

    def read_as(
        self,
        name: str,
        dtypes: Collection[str],
        shape: Sequence[int],
        where: str,
        flat: bool = False,
    ) -> Tensor:
        """Read one tensor in this shape after `check`."""
        self.check(name, dtypes, shape, where, flat)
        return self.read(name).reshape(tuple(shape))

    def _tensor(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise SourceError(
                f"{str(self.folder)!r}: there is no tensor {name!r} in its safetensors files"
            ) from None

    def _opened(self) -> dict[str, StoredTensor]:
        index = self._file(self._index, "*.safetensors.index.json", instead_of=self._single)
        if index is None:
            single = self._file(self._single, "*.safetensors")
            if single is not None:
                return read_header(single, self._backend)
            pickles = sorted(p.name for p in self.folder.glob("pytorch_model*.bin"))
            raise SourceError(
                f"{str(self.folder)!r} holds {pickles[0]}, a pickle file, which can run code when "
                "it is read. Save the model as safetensors first (model.save_pretrained)"
                if pickles
                else f"{str(self.folder)!r} has neither {self._single} nor {self._index}. "
                "Give the folder of a Hugging Face checkpoint"
            )
        tensors: dict[str, StoredTensor] = {}
        for file in _shards(index):
            stored = read_header(file, self._backend)
            if twice := sorted(stored.keys() & tensors.keys()):
                raise SourceError(
                    f"{str(file)!r}: {listed(map(repr, twice))} is also in another shard; download "
                    "the model again"
                )
            tensors |= stored
        return tensors

    def _file(self, name: str, pattern: str, instead_of: str = "") -> Path | None:
        """The file `name`, or else the only one that matches `pattern`, unless `instead_of` exists.

        Raises:
            SourceError: several files match.
        """
        if (self.folder / name).is_file():
            return self.folder / name
        if instead_of and (self.folder / instead_of).is_file():
            return None
        matches = sorted(path for path in self.folder.glob(pattern) if path.is_file())
        if len(matches) > 1:
            names = listed(path.name for path in matches)
            raise SourceError(
                f"{str(self.folder)!r} has neither {self._single} nor {self._index}, but several "
                f"other files: {names}. Rename the right one to {name}, or remove the others"
            )
        return matches[0] if matches else None


def _shards(index: Path) -> list[Path]:
    """The files that an index names. What they hold is compared with the model, not the index.

    Raises:
        SourceError: a file is missing or outside of the folder, or the index is malformed.
    """
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise SourceError(
            f"{str(index)!r}: weight_map must give the file name of each tensor; download it again"
        )
    by_file = {file: name for name, file in weight_map.items()}
    for file, name in by_file.items():
        if set(file) & set("/\\\0") or not file.endswith(".safetensors"):
            raise SourceError(
                f"{str(index)!r}: tensor {name!r} is listed in {file!r}, which is not a "
                ".safetensors file in this folder"
            )
        if not (index.parent / file).is_file():
            raise SourceError(
                f"{str(index)!r}: file {file!r}, which should contain tensor {name!r}, is "
                "missing; download it too"
            )
    return [index.parent / file for file in sorted(by_file)]


def check_shards_are_inside(folder: Path) -> None:
    """Refuse an index that names files outside of its folder, which transformers would read.

    Raises:
        SourceError: with the index, the tensor and the file.
    """
    for index in sorted(folder.glob("*.index.json")):
        weight_map = read_object(index).get("weight_map")
        for name, file in weight_map.items() if isinstance(weight_map, dict) else ():
            path = os.path.normpath(str(file))
            if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
                raise SourceError(
                    f"{str(index)!r}: tensor {name!r} is listed in {file!r}, outside of the "
                    "model's folder. Put the file into the folder and its plain name into the index"
                )


def read_header(file: Path, backend: str = "pread") -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, in the order in which they are stored; reads no data.

    Raises:
        SourceError: the file is truncated or malformed.
    """
    try:
        handle = safe_open(file, framework="pt", backend=backend)
        slices = {name: handle.get_slice(name) for name in handle.offset_keys()}
        return {
            name: StoredTensor(handle, part.get_dtype(), tuple(part.get_shape()))
            for name, part in slices.items()
        }
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"{str(file)!r} is truncated, or not a safetensors file ({error}); download it again"
        ) from error
