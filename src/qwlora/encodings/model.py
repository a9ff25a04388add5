"""Encodings and encodings files as plain values, in one convention for all four versions.

    integer    x_hat = (q + offset + zero_point_shift) * scale, q unsigned in [0, 2^bitwidth - 1]
    LPBQ       x_hat = (q - 2^(bitwidth - 1)) * block_scale * channel_scale, block_scale integer
    float      x_hat = cast(x / scale) * scale; float8 and float4. 16-bit floats have no scale

A field is None if the file's version cannot express it: 0.6.1 and 1.0.0 have no axis, 2.x has no
sections. Shapes of `scale` and `offset`:

    weight [A, B], per tensor                      []
    weight [A, B], per channel, axis 0             [A]
    weight [A, B], blocks of s along axis 1        [A, B / s]; flat if the version has no axis

Values only, numpy, no torch. `encodings_file.py` reads and writes files, `convert.py` converts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from qwlora.errors import EncodingsFileError

VERSIONS = ("0.6.1", "1.0.0", "2.0.0", "2.1.0")
MAX_BITWIDTH = 32
FLOAT_FORMATS = {
    "float4e2m1": 4,
    "float8e4m3fn": 8,
    "float8e4m3fnuz": 8,
    "float8e5m2": 8,
    "float8e5m2fnuz": 8,
}

# Order of a flat list of block scales: as the tensor is stored, or channel by channel.
BlockOrder = Literal["channel", "tensor"]
BLOCK_ORDERS: tuple[BlockOrder, ...] = get_args(BlockOrder)

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class _Value:
    """Compared field by field, arrays by shape and value; not hashable."""

    name: str
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        names = [f.name for f in fields(self)]  # type: ignore[arg-type]
        return all(_same(getattr(self, name), getattr(other, name)) for name in names)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[type-var]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return (
            isinstance(a, np.ndarray)
            and isinstance(b, np.ndarray)
            and a.shape == b.shape
            and bool((a == b).all())
        )
    return bool(a == b)


@dataclass(frozen=True, eq=False)
class IntegerEncoding(_Value):
    """A grid of integers.

    Args:
        name: of the tensor.
        bitwidth: 1 to 32.
        scale: float64, > 0; its shape is described above.
        offset: int64, same shape, AIMET's sign; `-2^(bitwidth - 1)` on a symmetric grid.
        symmetric: as stored (0.6.1, 1.0.0); every offset is at the center (2.x).
        signed: stored codes are signed; None in 0.6.1 and 1.0.0.
        axis: of the channels or the blocks; None per tensor, and in 0.6.1 and 1.0.0.
        block_size: values along `axis` that share a scale; None without blocks.
        zero_point_shift: 0 or 0.5, in steps.

    Raises:
        EncodingsFileError: shapes of scale and offset differ, or an offset is not an integer.
    """

    name: str
    bitwidth: int
    scale: Floats
    offset: Integers
    symmetric: bool
    signed: bool | None = None
    axis: int | None = None
    block_size: int | None = None
    zero_point_shift: float = 0.0

    def __post_init__(self) -> None:
        _freeze(self, scale=np.float64, offset=np.int64)
        if self.scale.shape != self.offset.shape:
            raise EncodingsFileError(
                repr(self.name),
                [f"scale has shape {list(self.scale.shape)} but offset {list(self.offset.shape)}"],
            )

    @property
    def granularity(self) -> str:
        """`tensor`, `channel` or `block`."""
        return (
            "block" if self.block_size is not None else "channel" if self.scale.ndim else "tensor"
        )

    @property
    def center(self) -> int:
        """The offset of a symmetric grid."""
        return -(2 ** (self.bitwidth - 1))


@dataclass(frozen=True, eq=False)
class LpbqEncoding(_Value):
    """Low-power blocks: symmetric, with `scale = block_scale * channel_scale`, block_scale integer.

    Args:
        name: of the tensor.
        bitwidth: of the stored codes (`compressed_bw` in 1.0.0).
        block_size: values that share a scale.
        block_scale: int64 >= 1, one per block; flat in 1.0.0.
        channel_scale: float64 > 0, broadcast to `block_scale`; flat in 1.0.0.
        decompressed_bitwidth: of the channel's grid (`bw` in 1.0.0). Block scales are at most
            2^(decompressed_bitwidth - bitwidth). None in 2.x.
        axis: of the blocks, not negative; None in 1.0.0.
        channel_axis: of `channel_scale`, not negative; None in 1.0.0, and in 2.0.0 if the shapes
            leave it open.
    """

    name: str
    bitwidth: int
    block_size: int
    block_scale: Integers
    channel_scale: Floats
    decompressed_bitwidth: int | None = None
    axis: int | None = None
    channel_axis: int | None = None

    def __post_init__(self) -> None:
        _freeze(self, block_scale=np.int64, channel_scale=np.float64)

    granularity = "LPBQ"


@dataclass(frozen=True, eq=False)
class FloatEncoding(_Value):
    """A cast to a float format.

    Args:
        name: of the tensor.
        bitwidth: of the float.
        format: ONNX's name, one of `FLOAT_FORMATS`; None in 0.6.1 and 1.0.0, which do not
            distinguish float16 from bfloat16.
        scale: float64 > 0, shaped as in `IntegerEncoding`; None in 0.6.1 and 1.0.0 (a scale of 1).
        axis, block_size: as in `IntegerEncoding`.
    """

    name: str
    bitwidth: int
    format: str | None = None
    scale: Floats | None = None
    axis: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.scale is not None:
            _freeze(self, scale=np.float64)

    @property
    def granularity(self) -> str:
        """`tensor`, `channel` or `block`."""
        return (
            "block"
            if self.block_size is not None
            else "channel"
            if self.scale is not None and self.scale.ndim
            else "tensor"
        )


Encoding = IntegerEncoding | LpbqEncoding | FloatEncoding


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
    encodings: tuple[Encoding, ...]
    parameters: frozenset[str] | None = None
    excluded_layers: tuple[str, ...] | None = None
    quantizer_args: Mapping[str, Any] | None = None
    producer: Mapping[str, str] | None = None

    __hash__ = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        by_name = self.by_name
        problems = [
            f"{n!r}: two encodings have this name" for n in repeated(e.name for e in self.encodings)
        ]
        problems += [
            f"{n!r}: is listed as a parameter, but has no encoding"
            for n in sorted((self.parameters or set()) - by_name.keys())
        ]
        if problems:
            raise EncodingsFileError("encodings", problems)

    @property
    def by_name(self) -> dict[str, Encoding]:
        """The encodings by name, in the file's order."""
        return {e.name: e for e in self.encodings}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EncodingsFile):
            return NotImplemented
        mine, theirs = (
            [getattr(f, field.name) for field in fields(f) if field.name != "encodings"]
            for f in (self, other)
        )
        return mine == theirs and self.by_name == other.by_name

    def replace(self, **changes: Any) -> EncodingsFile:
        """A copy with some fields changed."""
        return replace(self, **changes)


def repeated(names: Iterable[str]) -> list[str]:
    """The names that are there more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def _freeze(value: Any, **dtypes: Any) -> None:
    for name, dtype in dtypes.items():
        given = np.asarray(getattr(value, name))
        with np.errstate(invalid="ignore"):
            array = given.astype(dtype)
        if dtype is np.int64 and (array != given).any():
            raise EncodingsFileError(
                repr(value.name), [f"{name} holds {given[array != given][0]}; integers are needed"]
            )
        array.flags.writeable = False
        object.__setattr__(value, name, array)
