"""A memory-mapped GGUF file: its checked header and the bytes of each tensor.

    "GGUF"  u32 version (2 or 3)  u64 number of tensors  u64 number of pairs
    pairs    string key, u32 type, value
    tensors  string name, u32 number of axes, u64 axis lengths (fastest first), u32 type,
             u64 offset into the data
    padding to a multiple of `general.alignment` (default 32), then the data

Everything is little-endian. A string is a u64 length and UTF-8 bytes; an array is u32 type, u64
count and values.

No read goes beyond the end of the file, so a damaged header cannot cost much time or memory,
whatever it claims. Source: `docs/gguf.md` of ggml.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwlora.errors import SourceError
from qwlora.system.optional_packages import require

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from torch import Tensor

gguf = require("gguf", "gguf", "to read GGUF files")

VERSIONS = (2, 3)
# `struct` characters of the scalar types 0 to 12; 8 and 9 are STRING and ARRAY
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
TOKENS = "tokenizer.ggml.tokens"
# Metadata keys with these words may be larger than any axis of a tensor.
UNBOUNDED = ("context", "window", "vocab_size")


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

    Attributes:
        metadata: scalars, strings and lists of numbers by key. Lists of strings and those of the
            tokenizer are not kept; their length replaces them.
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
        # Copy on write, because torch expects writable memory; the file is never modified.
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="c")
        self._data = self._bytes.data
        self._position = 0  # of the next byte of the header
        self._spans: dict[str, tuple[int, int, bool]] = {}  # of each pair; whether an array
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self._read_header_()
        self._check_metadata()

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def raw(self, name: str) -> UInt8[Tensor, "*rows bytes"]:
        """The bytes of one tensor, row by row; a view of the mapped file."""
        # Imported here, because a run that skips all stages only reads metadata.
        import torch

        tensor = self.tensors[name]
        part = torch.from_numpy(self._bytes[tensor.start : tensor.start + tensor.size_bytes])
        return part.view(*tensor.shape[:-1], -1)

    def without_contents(self) -> bytes:
        """A small GGUF file with the same metadata, an empty vocabulary, and one value per tensor.
        transformers reads a configuration from it in a hundredth of the time."""
        pairs = [
            bytes(self._data[start:end])
            for key, (start, end, is_array) in self._spans.items()
            if not (is_array and key.startswith("tokenizer."))
        ]
        key = TOKENS.encode()
        pairs.append(struct.pack(f"<Q{len(key)}sIIQ", len(key), key, ARRAY, STRING, 0))
        # transformers looks at names of tensors too: without `output.weight`, it ties the head.
        float32 = gguf.GGMLQuantizationType.F32
        table = [
            struct.pack(f"<Q{len(name)}sIQIQ", len(name), name, 1, 1, float32, 0)
            for name in map(str.encode, self.tensors)
        ]
        head = struct.pack("<4sIQQ", b"GGUF", VERSIONS[-1], len(table), len(pairs))
        return b"".join([head, *pairs, *table, bytes(2 * self._alignment)])

    def error(self, problem: str) -> SourceError:
        """A SourceError whose message starts with the file's path."""
        return SourceError(f"{str(self.path)!r}: {problem}")

    def _damaged(self, problem: str) -> SourceError:
        return self.error(f"{problem}. It is truncated or damaged; download it again")

    @property
    def _alignment(self) -> int:
        size = self.metadata.get("general.alignment", 32)
        if not isinstance(size, int) or not 8 <= size <= 2**20 or size & (size - 1):
            raise self._damaged(f"general.alignment is {size!r}, not a power of two of at least 8")
        return size

    def _read_header_(self) -> None:
        magic, version, tensors, pairs = self._take("4sIQQ")
        if magic != b"GGUF":
            raise self.error(f"it begins with {magic!r}, but a GGUF file begins with b'GGUF'")
        if version not in VERSIONS:
            # A big-endian file has its version in the upper half of these four bytes.
            swapped = "; the file is big-endian, convert it with gguf_convert_endian.py"
            raise self.error(
                f"GGUF version {version} is not supported, {' and '.join(map(str, VERSIONS))} "
                f"are{'' if version & 0xFFFF else swapped}"
            )
        for _ in range(pairs):
            start, key = self._position, self._string()
            if key in self.metadata:
                raise self._damaged(f"metadata key {key[:80]!r} occurs twice")
            (kind,) = self._take("I")
            self.metadata[key] = self._value(key, kind)
            self._spans[key] = (start, self._position, kind == ARRAY)
        table, kinds = [], {kind.value: kind for kind in gguf.GGMLQuantizationType}
        for _ in range(tensors):
            name, (axes,) = self._string(), self._take("I")
            *lengths, kind, offset = self._take(f"{axes}QIQ")
            table.append((name, kind, tuple(reversed(lengths)), offset))
        alignment = self._alignment
        first = math.ceil(self._position / alignment) * alignment
        for name, number, shape, offset in table:
            if number not in kinds:
                raise self.error(
                    f"tensor {name!r} is of type {number}, which the installed gguf package does "
                    "not know; update it, or download the file again"
                )
            kind = kinds[number]
            values, size_bytes = gguf.GGML_QUANT_SIZES[kind]
            # numpy and torch count values in int64.
            if not shape or 0 in shape or shape[-1] % values or math.prod(shape) >= 2**63:
                raise self._damaged(
                    f"tensor {name!r} has the invalid shape {list(shape)}; rows of {kind.name} "
                    f"have a multiple of {values} values"
                )
            start, length = first + offset, math.prod(shape) // values * size_bytes
            if offset % alignment or start + length > len(self._data):
                raise self._damaged(
                    f"tensor {name!r} ({kind.name}, shape {list(shape)}) would be at bytes "
                    f"{start} to {start + length}, but the file has {len(self._data)} and its "
                    f"tensors start at multiples of {alignment}"
                )
            if name in self.tensors:
                raise self._damaged(f"tensor {name!r} occurs twice")
            self.tensors[name] = StoredTensor(name, kind.name, shape, start, length)

    def _check_metadata(self) -> None:
        """Refuse one file of a split model, and sizes that no tensor of the file has."""
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
        # transformers reads these again for the configuration and checks much less: a damaged
        # number of layers would fill the memory.
        longest = max([2**20, *(n for tensor in self.tensors.values() for n in tensor.shape)])
        for key, value in self.metadata.items():
            is_size = key.startswith(f"{self.architecture}.") and not isinstance(value, str)
            if not is_size or any(word in key for word in UNBOUNDED):
                continue
            limit = len(self.tensors) if key.endswith(".block_count") else longest
            for number in value if isinstance(value, list) else [value]:
                if math.isfinite(number) if isinstance(number, float) else abs(number) <= limit:
                    continue
                raise self._damaged(
                    f"{key} is {number}, but the file has {len(self.tensors)} tensors, none longer "
                    f"than {longest} along an axis"
                )

    def _skip(self, size: int) -> int:
        """Skip the next `size` bytes; returns the position of the first."""
        start = self._position
        if size > len(self._data) - start:
            raise self._damaged(
                f"byte {start} of its header asks for {size} more bytes, but the file has "
                f"{len(self._data)}"
            )
        self._position += size
        return start

    def _take(self, layout: str) -> tuple[Any, ...]:
        start = self._skip(struct.calcsize(f"<{layout}"))
        return struct.unpack_from(f"<{layout}", self._data, start)

    def _string(self) -> str:
        (length,) = self._take("Q")
        start = self._skip(length)
        text = bytes(self._data[start : self._position])
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self._damaged(f"a string at byte {start} is not UTF-8: {text[:40]!r}") from None

    def _value(self, key: str, kind: int) -> Any:
        """A scalar, a string, a list of numbers, or the length of another array."""
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._take(SCALARS[kind])[0]
        if kind != ARRAY:
            raise self._damaged(f"the value of {key!r} is of type {kind}, which GGUF does not have")
        kind, count = self._take("IQ")
        if kind in SCALARS:
            start = self._skip(count * struct.calcsize(f"<{SCALARS[kind]}"))
            if not key.startswith("tokenizer."):
                return list(struct.unpack_from(f"<{count}{SCALARS[kind]}", self._data, start))
        elif kind == STRING:
            for _ in range(count):
                self._string()
        else:
            raise self.error(
                f"the array {key!r} holds values of type {kind}, but only numbers and strings are "
                "supported"
            )
        return count
