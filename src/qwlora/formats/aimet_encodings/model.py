"""Encodings and encodings files as plain values, in one convention for all four versions.

    integer    x_hat = (q + offset + zero_point_shift) * scale, q unsigned in [0, 2^bitwidth - 1]
    LPBQ       x_hat = (q - 2^(bitwidth - 1)) * block_scale * channel_scale, block_scale integer
    float      x_hat = cast(x / scale) * scale; float8 and float4. 16-bit floats have no scale

A field is None if the file's version cannot express it: 0.6.1 and 1.0.0 have no axis, 2.x has no
sections. Shapes of `scale` and `offset`:

    weight [A, B], per tensor                      []
    weight [A, B], per channel, axis 0             [A]
    weight [A, B], blocks of s along axis 1        [A, B / s]; flat if the version has no axis

An entry that contradicts itself cannot be constructed, whatever it is read from: the rules of
values are here, those of JSON fields in `documents.py`. numpy, no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from qwlora.errors import EncodingsFileError

VERSIONS = ("0.6.1", "1.0.0", "2.0.0", "2.1.0")
MAX_BITWIDTH = 32
# Runtimes store scales in float32 at most.
MAX_SCALE = float(np.finfo(np.float32).max)
FLOAT_FORMATS = {
    "float4e2m1": 4,
    "float8e4m3fn": 8,
    "float8e4m3fnuz": 8,
    "float8e5m2": 8,
    "float8e5m2fnuz": 8,
}

# Order of a flat list of block scales: as the tensor is stored, or channel by channel.
BlockOrder = Literal["channel", "tensor"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Entry(ABC):
    """An entry that contradicts itself, or has a value out of range, raises EncodingsFileError.
    Compared field by field, arrays by shape and value; not hashable."""

    name: str
    bitwidth: int

    arrays: ClassVar[dict[str, type[np.generic]]] = {}  # the fields that become read-only arrays
    replace = replace
    __hash__ = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        problems = [] if self.name else ["has no name"]
        if not 1 <= self.bitwidth <= MAX_BITWIDTH:
            problems.append(f"bitwidth is {self.bitwidth}, not from 1 to {MAX_BITWIDTH}")
        for key, dtype in self.arrays.items():
            if getattr(self, key) is None:
                continue
            values = np.asarray(getattr(self, key))
            # numpy warns of NaN in a cast to integers; the comparison below finds it.
            with np.errstate(invalid="ignore"):
                array = values.astype(dtype)
            if dtype is np.int64 and (array != values).any():
                problems.append(f"{key} holds {values[array != values][0]}; integers are needed")
            array.flags.writeable = False
            object.__setattr__(self, key, array)
        if problems := problems or [*self._problems()]:
            raise EncodingsFileError(repr(self.name), problems)

    @abstractmethod
    def _problems(self) -> Iterator[str]:
        """What is wrong with the values; their types are right."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        keys = [field.name for field in fields(self)]
        return all(np.array_equal(getattr(self, key), getattr(other, key)) for key in keys)


def _granularity(entry: IntegerEncoding | FloatEncoding) -> str:
    if entry.block_size is not None:
        return "block"
    return "channel" if entry.scale is not None and entry.scale.ndim else "tensor"


@dataclass(frozen=True, eq=False)
class IntegerEncoding(_Entry):
    """A grid of integers.

    Args:
        scale: float64, > 0; its shape is described above.
        offset: int64, same shape, AIMET's sign; `-2^(bitwidth - 1)` on a symmetric grid.
        symmetric: as stored (0.6.1, 1.0.0); every offset is at the center (2.x).
        signed: stored codes are signed; None in 0.6.1 and 1.0.0.
        axis: of the channels or the blocks; None per tensor, and in 0.6.1 and 1.0.0.
        block_size: values along `axis` that share a scale; None without blocks.
        zero_point_shift: 0 or 0.5, in steps.
    """

    scale: Floats
    offset: Integers
    symmetric: bool
    signed: bool | None = None
    axis: int | None = None
    block_size: int | None = None
    zero_point_shift: float = 0.0

    arrays = {"scale": np.float64, "offset": np.int64}
    granularity = property(_granularity)

    def _problems(self) -> Iterator[str]:
        yield from _shape_problems(self.scale, self.axis, self.block_size)
        if self.scale.shape != self.offset.shape:
            yield f"scale has shape {list(self.scale.shape)} but offset {list(self.offset.shape)}"
        if self.zero_point_shift not in (0, 0.5):
            yield f"zero_point_shift is {self.zero_point_shift}, not 0 or 0.5"

    @property
    def center(self) -> int:
        return -(2 ** (self.bitwidth - 1))

    @property
    def is_centered(self) -> bool:
        """Whether the grid is symmetric, whatever `symmetric` says."""
        return bool((self.offset == self.center).all())


@dataclass(frozen=True, eq=False)
class LpbqEncoding(_Entry):
    """Low-power blocks: symmetric, with `scale = block_scale * channel_scale`, block_scale integer.

    Args:
        bitwidth: of the stored codes (`compressed_bw` in 1.0.0).
        block_size: values that share a scale.
        block_scale: int64 >= 1, one per block; flat in 1.0.0.
        channel_scale: float64 > 0, broadcast to `block_scale`; flat in 1.0.0.
        decompressed_bitwidth: of the channel's grid (`bw` in 1.0.0). Block scales are at most
            2^(decompressed_bitwidth - bitwidth). None in 2.x.
        axis: of the blocks, not negative; None in 1.0.0.
    """

    block_size: int
    block_scale: Integers
    channel_scale: Floats
    decompressed_bitwidth: int | None = None
    axis: int | None = None

    arrays = {"block_scale": np.int64, "channel_scale": np.float64}
    granularity = "LPBQ"

    @property
    def channel_axis(self) -> int | None:
        """The axis along which channel scales differ; None if they are flat, or have several."""
        if self.axis is None:
            return None
        sizes = self.channel_scale.shape
        others = sorted({*range(len(sizes))} - {self.axis}, key=lambda i: self.block_scale.shape[i])
        axes = [i for i, size in enumerate(sizes) if size > 1] or others[:1]
        return axes[0] if len(axes) == 1 else None

    def _problems(self) -> Iterator[str]:
        yield from _range_problems(self.channel_scale, "channel scales")
        yield from _shape_problems(self.block_scale, self.axis, self.block_size, "block scales")
        blocks, channels = self.block_scale.shape, self.channel_scale.shape
        sizes = zip(blocks, channels, strict=True)
        if len(blocks) != len(channels) or any(b % c for b, c in sizes if c):
            yield f"{list(channels)} channel scales cannot share {list(blocks)} block scales evenly"
        if self.decompressed_bitwidth is None or not self.block_scale.size:
            return
        of_bits = f"{self.bitwidth} compressed of {self.decompressed_bitwidth} decompressed bits"
        largest = 2.0 ** (self.decompressed_bitwidth - self.bitwidth)
        if not self.bitwidth <= self.decompressed_bitwidth <= MAX_BITWIDTH:
            yield f"{of_bits} is not possible; the limit is {MAX_BITWIDTH}"
        elif self.block_scale.max() > largest:
            yield f"block scales reach {self.block_scale.max()}; {of_bits} end at {largest:.0f}"


@dataclass(frozen=True, eq=False)
class FloatEncoding(_Entry):
    """A cast to a float format.

    Args:
        bitwidth: of the float.
        format: ONNX's name, one of `FLOAT_FORMATS`; None in 0.6.1 and 1.0.0, which do not
            distinguish float16 from bfloat16.
        scale: float64 > 0, shaped as in `IntegerEncoding`; None without a format (a scale of 1).
        axis, block_size: as in `IntegerEncoding`.
    """

    format: str | None = None
    scale: Floats | None = None
    axis: int | None = None
    block_size: int | None = None

    arrays = {"scale": np.float64}
    granularity = property(_granularity)

    def _problems(self) -> Iterator[str]:
        if self.format is not None and FLOAT_FORMATS.get(self.format) != self.bitwidth:
            yield f"{self.format!r} is not a float format of {self.bitwidth} bits"
        if (self.format is None) != (self.scale is None):
            yield "has a scale but no format, or a format but no scale"
        if self.scale is not None:
            yield from _shape_problems(self.scale, self.axis, self.block_size)


Entry = IntegerEncoding | LpbqEncoding | FloatEncoding


def _range_problems(scale: npt.NDArray[Any], what: str) -> Iterator[str]:
    bad = ~((scale > 0) & (scale <= MAX_SCALE))
    if bad.any():
        yield (
            f"{what} must be above 0 and at most {MAX_SCALE:.3g}; {int(bad.sum())} of "
            f"{scale.size} are not, the first is {scale[bad][0]}"
        )


def _shape_problems(
    scale: npt.NDArray[Any], axis: int | None, block_size: int | None, what: str = "scale"
) -> Iterator[str]:
    yield from _range_problems(scale, what)
    if not scale.size:
        yield f"{what} is empty"
    if block_size is not None and block_size < 1:
        yield f"block_size is {block_size}; an integer from 1 is needed"
    if not scale.ndim and (axis is not None or block_size is not None):
        yield f"{what} is one number; with an axis or a block_size it must be a list"
    # Scales are nested only for blocks along a known axis.
    elif scale.ndim > 1 and (block_size is None or axis is None):
        yield (
            f"{what} has {scale.ndim} axes; without an axis and a block_size it is one number or "
            "one plain list"
        )
    elif block_size is not None and axis is not None and not 0 <= axis < scale.ndim:
        yield f"axis is {axis}, outside scales of {scale.ndim} axes"


@dataclass(frozen=True, eq=False)
class EncodingsFile:
    """The content of an encodings file. Compared regardless of the order of the encodings.

    Args:
        version: one of `VERSIONS`.
        encodings: with distinct names.
        parameters: names of the encodings of parameters, the rest being activations; None in 2.x.
        excluded_layers: names of layers that were not quantized, or None.
        quantizer_args: settings of the whole model, plain values, or None.
        producer: `{package, version}`, or None.

    Raises:
        EncodingsFileError: a name is repeated, or a parameter has no encoding.
    """

    version: str
    encodings: tuple[Entry, ...]
    parameters: frozenset[str] | None = None
    excluded_layers: tuple[str, ...] | None = None
    quantizer_args: Mapping[str, Any] | None = None
    producer: Mapping[str, str] | None = None

    replace = replace
    __hash__ = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        counts = Counter(entry.name for entry in self.encodings)
        problems = [f"{n!r}: two encodings have this name" for n in counts if counts[n] > 1]
        problems += [
            f"{name!r}: is listed as a parameter, but has no encoding"
            for name in sorted((self.parameters or frozenset()) - set(counts))
        ]
        if problems:
            raise EncodingsFileError("encodings", problems)

    @property
    def by_name(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.encodings}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EncodingsFile):
            return NotImplemented
        mine, others = (vars(file) | {"encodings": file.by_name} for file in (self, other))
        return mine == others


def has_axes(version: str) -> bool:
    """Whether a version has axes and nested scales (2.x), instead of sections and flat lists."""
    return version >= "2"
