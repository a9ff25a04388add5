"""A memory-mapped GGUF file: its checked header and the bytes of each tensor.

    "GGUF"  u32 version (2 or 3)  u64 number of tensors  u64 number of pairs
    pairs    string key, u32 type, value
    tensors  string name, u32 number of axes, u64 axis lengths (fastest first), u32 type,
             u64 offset into the data
    padding to a multiple of `general.alignment` (default 32), then the data

Everything is little-endian. A string is a u64 length and UTF-8 bytes; an array is u32 type, u64
count and values.

Every length and count is compared with the remaining bytes, so a damaged header cannot cost much
time or memory, whatever it claims. transformers reads the same header again for the configuration
and checks much less, so values that would harm it are refused here. Source: `docs/gguf.md` of ggml.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwlora.errors import MissingExtraError, SourceError

try:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
except ImportError as error:
    raise MissingExtraError(
        "gguf is needed to read GGUF files and is not installed: pip install 'qwlora[gguf]'"
    ) from error

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from torch import Tensor

VERSIONS = (2, 3)
MOST_AXES, MOST_NAME_BYTES = 4, 64  # limits of ggml
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
TOKENS = "tokenizer.ggml.tokens"
UNBOUNDED = ("context", "window", "vocab_size")
"""Metadata keys with these words may be larger than any axis of a tensor."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file: the name of its type (`Q4_K`), its shape in torch's order, and the
    position of its bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int


class GgufFile:
    """The metadata and tensors of a GGUF file.

    Args:
        path: the file.

    Attributes:
        metadata: scalars and strings by key; for an array, its length.
        tensors: the stored tensors by name, in the file's order.

    Raises:
        SourceError: the file is not a GGUF file, is truncated, or its header is inconsistent.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise SourceError(f"{str(path)!r} is not a file")
        if self.path.stat().st_size < 24:
            raise self.error("it is too short for a GGUF file")
        # copy on write, because torch expects writable memory; the file is never modified
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="c")
        reader = _Reader(self)
        self._spans: dict[str, tuple[int, int, bool]] = {}
        self.metadata = reader.pairs()
        table = [reader.tensor() for _ in range(reader.tensor_count)]
        self.tensors = self._placed(table, reader.position)
        self._check_numbers()

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return str(self.metadata["general.architecture"])

    def raw(self, name: str) -> UInt8[Tensor, "*rows bytes"]:
        """The bytes of one tensor, row by row; a view of the mapped file."""
        import torch  # not above: a run that skips everything reads metadata only

        tensor = self.tensors[name]
        part = torch.from_numpy(self._bytes[tensor.start : tensor.start + tensor.size_bytes])
        return part.view(*tensor.shape[:-1], -1)

    def without_contents(self) -> bytes:
        """A small GGUF file with the same metadata, an empty vocabulary, and one value per tensor.

        To read a configuration, transformers creates a Python object for every token of the
        vocabulary. From this file, it takes a hundredth of the time.
        """
        kept = [
            bytes(self._bytes[start:end])
            for key, (start, end, array) in self._spans.items()
            if not (array and key.startswith("tokenizer."))
        ]
        kept.append(
            struct.pack(f"<Q{len(TOKENS)}sIIQ", len(TOKENS), TOKENS.encode(), ARRAY, STRING, 0)
        )
        names = [name.encode() for name in self.tensors]
        table = [
            struct.pack(f"<Q{len(name)}sIQIQ", len(name), name, 1, 1, GGMLQuantizationType.F32, 0)
            for name in names
        ]
        alignment = self.metadata.get("general.alignment", 32)
        return b"".join(
            [
                struct.pack("<4sIQQ", b"GGUF", VERSIONS[-1], len(table), len(kept)),
                *kept,
                *table,
                bytes(2 * alignment),
            ]
        )

    def error(self, what: str) -> SourceError:
        """A SourceError whose message starts with the file's path."""
        return SourceError(f"{str(self.path)!r}: {what}")

    def _placed(
        self, table: list[tuple[str, int, tuple[int, ...], int]], end: int
    ) -> dict[str, StoredTensor]:
        alignment = self.metadata.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or not 8 <= alignment <= 2**20
            or alignment & (alignment - 1)
        ):
            raise self.error(
                f"general.alignment is {alignment!r}, not a power of two of at least 8; download "
                "the file again"
            )
        first, tensors = math.ceil(end / alignment) * alignment, {}
        for name, number, shape, offset in table:
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise self.error(
                    f"tensor {name!r} is of type {number}, which the installed gguf package does "
                    "not know; update it, or download the file again"
                ) from None
            values, size_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % values:
                raise self.error(
                    f"tensor {name!r} has rows of {shape[-1]} values, which blocks of {values} "
                    f"({kind.name}) do not divide; download the file again"
                )
            length = math.prod(shape) // values * size_bytes
            if offset % alignment or first + offset + length > len(self._bytes):
                raise self.error(
                    f"tensor {name!r} ({kind.name}, shape {list(shape)}) would be at bytes "
                    f"{first + offset} to {first + offset + length}, but the file "
                    f"has {len(self._bytes)} and its tensors start at multiples of {alignment}. It "
                    "is truncated or damaged; download it again"
                )
            if name in tensors:
                raise self.error(f"tensor {name!r} occurs twice; download the file again")
            tensors[name] = StoredTensor(name, kind.name, shape, first + offset, length)
        return tensors

    def _check_numbers(self) -> None:
        """Refuse one file of a split model, and metadata with sizes that no tensor of the file
        has."""
        if not isinstance(self.metadata.get("general.architecture"), str):
            raise self.error(
                "general.architecture does not name the model, so this is not the GGUF file of a "
                "language model"
            )
        parts = self.metadata.get("split.count", 1)
        if parts != 1:
            raise self.error(
                f"this is one of {parts} files of the model; join them first (llama-gguf-split "
                "--merge)"
            )
        longest = max(
            [2**20, *(length for tensor in self.tensors.values() for length in tensor.shape)]
        )
        for key, value in self.metadata.items():
            if (
                not key.startswith(self.architecture + ".")
                or isinstance(value, str)
                or any(part in key for part in UNBOUNDED)
            ):
                continue
            limit: float = longest
            if isinstance(value, float):
                limit = math.inf
            elif key.endswith(".block_count"):
                limit = len(self.tensors)
            in_range = -limit <= value <= limit  # False for nan
            if not in_range or value in (math.inf, -math.inf):
                raise self.error(
                    f"{key} is {value}, but the file has {len(self.tensors)} tensors, none longer "
                    f"than {longest} along an axis. It is damaged; download it again"
                )


class _Reader:
    """Reads the header sequentially; `position` is the next byte."""

    def __init__(self, file: GgufFile):
        self.file, self.data, self.position = file, file._bytes.data, 0
        magic, version = self.take("4sI")
        if magic != b"GGUF":
            raise file.error(f"it begins with {magic!r}, but a GGUF file begins with b'GGUF'")
        if version not in VERSIONS:
            swapped = (
                "; the file is big-endian, convert it with gguf_convert_endian.py"
                if version & 0xFFFF == 0
                else ""
            )
            raise file.error(
                f"GGUF version {version} is not supported, {' and '.join(map(str, VERSIONS))} "
                f"are{swapped}"
            )
        self.tensor_count, self.pair_count = self.take("QQ")
        for count, smallest, what in (
            (self.tensor_count, 33, "tensors"),
            (self.pair_count, 14, "metadata pairs"),
        ):
            if count * smallest > len(self.data):
                raise file.error(
                    f"its header claims {count} {what}, more than its {len(self.data)} bytes can "
                    "hold. It is damaged; download it again"
                )

    def take(self, layout: str) -> tuple[Any, ...]:
        """Read values of a `struct` layout."""
        size = struct.calcsize("<" + layout)
        self.need(size)
        values = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += size
        return values

    def need(self, size: int) -> None:
        if size > len(self.data) - self.position:
            raise self.file.error(
                f"byte {self.position} of its header asks for {size} more bytes, but the file has "
                f"{len(self.data)}. It is truncated or damaged; download it again"
            )

    def skip(self, size: int) -> None:
        self.need(size)
        self.position += size

    def string(self, what: str, most: int | None = None) -> str:
        (length,) = self.take("Q")
        if most is not None and length > most:
            raise self.file.error(
                f"a {what} of {length} bytes at byte {self.position}; at most {most} are allowed"
            )
        self.need(length)
        text = bytes(self.data[self.position : self.position + length])
        self.position += length
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self.file.error(
                f"a {what} at byte {self.position - length} is not UTF-8: {text[:40]!r}"
            ) from None

    def pairs(self) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(self.pair_count):
            start = self.position
            key = self.string("key", 2**16 - 1)
            if key in metadata:
                raise self.file.error(
                    f"metadata key {key[:80]!r} occurs twice; download the file again"
                )
            (kind,) = self.take("I")
            metadata[key] = self.value(key, kind)
            self.file._spans[key] = (start, self.position, kind == ARRAY)
        return metadata

    def value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self.string(f"value of {key!r}")
        if kind == ARRAY:
            return self.array(key)
        if kind not in SCALARS:
            raise self.file.error(
                f"the value of {key!r} is of type {kind}, which GGUF does not have"
            )
        return self.take(SCALARS[kind])[0]

    def array(self, key: str) -> int:
        kind, count = self.take("IQ")
        if kind in SCALARS:
            self.skip(count * struct.calcsize("<" + SCALARS[kind]))
        elif kind == STRING:
            self.need(count * 8)
            for _ in range(count):
                self.string(f"string in {key!r}")
        else:
            raise self.file.error(
                f"the array {key!r} holds values of type {kind}, but only numbers and strings are "
                "supported"
            )
        return count

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self.string("tensor name", MOST_NAME_BYTES)
        if not name.isprintable() or set(name) & set("/\\ ") or not name:
            raise self.file.error(
                f"{name!r} is not a valid tensor name: it is empty, or contains slashes, spaces or "
                "unprintable characters; download the file again"
            )
        (axes,) = self.take("I")
        if not 1 <= axes <= MOST_AXES:
            raise self.file.error(f"tensor {name!r} has {axes} axes; 1 to {MOST_AXES} are allowed")
        lengths = self.take(f"{axes}Q")
        kind, offset = self.take("IQ")
        if 0 in lengths or math.prod(lengths) >= 2**63:
            raise self.file.error(
                f"tensor {name!r} has the invalid shape {list(reversed(lengths))}; download the "
                "file again"
            )
        return name, kind, tuple(reversed(lengths)), offset
