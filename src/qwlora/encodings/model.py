"""One encoding of an encodings file, and the file, as plain values: what all four versions say, in one convention. numpy, no torch.

    integer     x_hat = (q + offset + zero_point_shift) * scale                q unsigned, in [0, 2^bitwidth - 1]
    LPBQ        x_hat = (q - 2^(bitwidth - 1)) * block_scale * channel_scale   low power block quantization: integer scales under float ones
    float       x_hat = cast(x / scale) * scale                                float8 and float4 formats; 16 bits have no scale

A field is None where the file's version does not say: no axis in 0.6.1 and 1.0.0, no sections in 2.x. Shapes of `scale` (and `offset`):

    weight [A, B], per tensor              scale []
    weight [A, B], per channel, axis 0     scale [A]
    weight [A, B], blocks of s on axis 1   scale [A, B / s]      flat, [A * B / s], where the version has no axis

Values only: reading and writing is `document.py`, converting `convert.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

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

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class _Value:
    """Equality by fields, arrays compared in shape and bit for bit; not hashable."""

    name: str
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))  # type: ignore[arg-type]

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
        name: the tensor's.
        bitwidth: 1 to 32.
        scale: float64, > 0; its shape says how many grids there are (see the module).
        offset: int64, the same shape, AIMET's sign; `-2^(bitwidth - 1)` on a symmetric grid.
        symmetric: what the file says (0.6.1, 1.0.0), or whether every offset is at the centre (2.x, which has no such field).
        signed: whether stored codes are signed; None in 0.6.1 and 1.0.0, which do not say.
        axis: the channel axis, or the axis that is cut into blocks; None where the version does not say, and per tensor.
        block_size: values along `axis` that share a scale; None when there are no blocks.
        zero_point_shift: 0 or 0.5, in steps.

    Raises:
        EncodingsFileError: scale and offset differ in shape, or an offset is not an integer.
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
    def centre(self) -> int:
        """The offset of a symmetric grid."""
        return -(2 ** (self.bitwidth - 1))


@dataclass(frozen=True, eq=False)
class LpbqEncoding(_Value):
    """Symmetric blocks whose scale is a small integer times a float: `scale = block_scale * channel_scale`.

    Args:
        name: the tensor's.
        bitwidth: of the stored codes (`compressed_bw` in 1.0.0).
        block_size: values that share a scale.
        block_scale: int64 >= 1, one a block; flat in 1.0.0.
        channel_scale: float64 > 0; the rank of `block_scale`, with 1 where one value serves the whole axis; flat in 1.0.0.
        decompressed_bitwidth: bitwidth of the channel's grid (`bw` in 1.0.0), integers reach up to 2^(decompressed - stored); None in 2.x.
        axis: the axis that is cut into blocks, never negative; None in 1.0.0.
        channel_axis: the axis of `channel_scale`, never negative; None in 1.0.0, and where shapes leave it open in 2.0.0.
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
    """A cast to a small float.

    Args:
        name: the tensor's.
        bitwidth: of the float.
        format: ONNX's name, one of `FLOAT_FORMATS`; None in 0.6.1 and 1.0.0, which do not tell float16 from bfloat16.
        scale: float64 > 0, shaped as an integer encoding's; None in 0.6.1 and 1.0.0, which know the scale 1 only.
        axis, block_size: as of an integer encoding.
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
    """Everything that an encodings file says. Two are equal when they say the same; the order of the encodings says nothing.

    Args:
        version: one of `VERSIONS`.
        encodings: all of them, names distinct.
        parameters: the names of those that are parameters, the others being activations; None in 2.x, which has one list.
        excluded_layers: names of layers that were not quantized; None where the file does not say.
        quantizer_args: how the whole model was quantized, plain values; None where the file does not say.
        producer: `{package, version}`; None where the file does not say.

    Raises:
        EncodingsFileError: a name twice, or a parameter without an encoding.
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
            f"{n!r}: encodings have distinct names; this one is there twice"
            for n in _repeated(e.name for e in self.encodings)
        ]
        problems += [
            f"{n!r}: is named as a parameter, but has no encoding"
            for n in sorted((self.parameters or set()) - by_name.keys())
        ]
        if problems:
            raise EncodingsFileError("encodings", problems)

    @property
    def by_name(self) -> dict[str, Encoding]:
        """The encodings under their names, in the file's order."""
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


def _repeated(names: Any) -> list[str]:
    seen: set[str] = set()
    return [n for n in names if n in seen or seen.add(n)]  # type: ignore[func-returns-value]


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
