"""The safetensors files of a Hugging Face folder, read through the `safetensors` library.

The files are `model.safetensors`, or else the shards in `model.safetensors.index.json`. If neither
exists, the folder's only safetensors file or index is used, whatever its name. Opening reads the
headers only; safetensors refuses truncated and malformed ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwlora.errors import SourceError, foreign_as, listed
from qwlora.system.strict_json import read_object

FLOATS = ("F32", "BF16", "F16", "F64")


class SafetensorsFiles:
    """The tensors in the safetensors files of `folder`, by their stored names.

    Args:
        stem: the usual name of the file, without what follows (`model`.safetensors).
        mapped: return views of the memory-mapped files instead of copies.

    Raises:
        SourceError: there are no safetensors files, or several and none has the usual name. Or the
            index refers to a file that is missing or outside the folder. Or a tensor is in two
            files, or a file is truncated or malformed.
    """

    def __init__(self, folder: str | Path, stem: str = "model", mapped: bool = True):
        self.folder = Path(folder)
        self._stored: dict[str, tuple[Any, Any]] = {}  # open file and slice of each tensor
        for file in _files_of(self.folder, f"{stem}.safetensors"):
            # Mapped pages count as resident until the map is dropped: 1.52 GiB instead of 0.90 for
            # the smallest model in docs/log/formats.md. Copies do not accumulate.
            try:
                handle = safe_open(file, framework="pt", backend="mmap" if mapped else "pread")
                stored = {name: (handle, handle.get_slice(name)) for name in handle.offset_keys()}
            except (OSError, SafetensorError) as error:
                raise SourceError(
                    f"{str(file)!r} is truncated, or not a safetensors file ({error}); download it "
                    "again"
                ) from error
            if twice := sorted(stored.keys() & self._stored.keys()):
                raise SourceError(
                    f"{str(file)!r}: {listed(map(repr, twice))} is also in another shard; download "
                    "the model again"
                )
            self._stored |= stored

    def names(self) -> list[str]:
        """All tensor names, in the order in which they are stored."""
        return list(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._of(name)[1].get_shape())

    def dtype(self, name: str) -> str:
        """The tensor's type as safetensors names it: `F32`, `BF16`, `I32` ..."""
        return str(self._of(name)[1].get_dtype())

    def nbytes(self, name: str) -> int:
        """The size of the stored tensor."""
        dtype = self.dtype(name)
        bits = 8 if dtype == "BOOL" else int(re.findall(r"\d+", dtype)[0])  # BF16, F8_E4M3 ...
        return math.prod(self.shape(name)) * bits // 8

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        # safetensors raises several types where torch does not have the type of the tensor.
        with foreign_as(SourceError, f"{str(self.folder)!r}: tensor {name!r} cannot be read"):
            tensor: Tensor = self._of(name)[0].get_tensor(name)
        return tensor

    def check(
        self,
        name: str,
        dtypes: Collection[str],
        shape: Sequence[int],
        where: str,
        flat: bool = False,
    ) -> None:
        """Check that a tensor has this shape (`flat`: as many values) and one of these types.
        `where`: the layer and its format, for messages."""
        if name not in self:
            raise SourceError(f"{where}: {name!r} is missing; download the model again")
        dtype, stored = self.dtype(name), self.shape(name)
        fits = math.prod(stored) == math.prod(shape) if flat else stored == (*shape,)
        if dtype not in dtypes or not fits:
            raise SourceError(
                f"{where}: {name!r} is {dtype} {list(stored)}, but the settings in "
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

    def _of(self, name: str) -> tuple[Any, Any]:
        if name not in self:
            raise SourceError(
                f"{str(self.folder)!r}: there is no tensor {name!r} in its safetensors files"
            )
        return self._stored[name]


def _files_of(folder: Path, single: str) -> list[Path]:
    index = f"{single}.index.json"
    # The file before the index, as in transformers: a model that was saved over its shards leaves
    # their index behind.
    if (folder / single).is_file():
        return [folder / single]
    if (folder / index).is_file():
        return _shards(folder / index)
    # AutoGPTQ writes names like gptq_model-4bit-128g.safetensors.
    files = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return _shards(files[0]) if files[0].suffix == ".json" else files
    missing = f"{str(folder)!r} has neither {single} nor {index}"
    if files:
        name = index if files[0].suffix == ".json" else single
        raise SourceError(
            f"{missing}, but several other files: {listed(path.name for path in files)}. Rename "
            f"the right one to {name}, or remove the others"
        )
    if pickles := sorted(path.name for path in folder.glob("pytorch_model*.bin")):
        raise SourceError(
            f"{str(folder)!r} holds {pickles[0]}, a pickle file, which can run code when it is "
            "read. Save the model as safetensors first (model.save_pretrained)"
        )
    raise SourceError(f"{missing}. Give the folder of a Hugging Face checkpoint")


def _shards(index: Path) -> list[Path]:
    # What the files hold is compared with the model, not with the index.
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise SourceError(
            f"{str(index)!r}: weight_map must give the file name of each tensor; download it again"
        )
    files = sorted({*weight_map.values()})
    for file in files:
        is_inside = file.endswith(".safetensors") and not set(file) & set("/\\\0")
        if not is_inside or not (index.parent / file).is_file():
            raise SourceError(
                f"{str(index)!r} lists {file!r}, which is not a .safetensors file in this folder; "
                "download it too"
            )
    return [index.parent / file for file in files]
