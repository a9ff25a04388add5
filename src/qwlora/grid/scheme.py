"""The request for a quantized tensor: bitwidth, symmetry, granularity. Plain values, free of torch.

A code is an unsigned integer `q` in `[0, 2^bitwidth - 1]`; an encoding (see `encoding.py`) maps it
to `x_hat = (q + offset) * scale`. The granularity says how many scales and offsets a tensor has:

    weight [A, B], PerTensor()           -> scale []
    weight [A, B], PerChannel(axis=0)    -> scale [A]
    weight [A, B], PerBlock(size=32)     -> scale [A, B / 32]   blocks of inputs, the last axis
    weight [A, B], Lpbq(32)              -> scale [A, B / 32]   each an integer times a row scale
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from qwlora.errors import GridError

BITWIDTHS = range(2, 17)


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for every index of `axis`: weight [A, B], axis 0 -> scale [A]."""

    axis: int = 0


@dataclass(frozen=True)
class PerBlock:
    """One scale per `size` neighbors along the last axis: weight [A, B] -> scale [A, B / size]."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise GridError(f"a block holds at least one value, not {self.size}")


@dataclass(frozen=True)
class Lpbq:
    """AIMET's low-power blocks: each block scale is an integer in `[1, 2^scale_bitwidth]` times the
    float scale of its row.

        weight [A, B] -> scale [A, B / size] = integers [A, B / size] * row scale [A, 1]

    See `lpbq.py` for the two factors. AIMET's "decompressed bitwidth" is `bitwidth +
    scale_bitwidth`. Not a subclass of `PerBlock`: a format that knows only `PerBlock` must refuse
    it instead of writing its scales as floats.
    """

    size: int
    scale_bitwidth: int = 4

    def __post_init__(self) -> None:
        if self.size < 1:
            raise GridError(f"a block holds at least one value, not {self.size}")
        if not 1 <= self.scale_bitwidth <= 8:
            raise GridError(f"a block's integer scale has 1 to 8 bits, not {self.scale_bitwidth}")


Granularity = PerTensor | PerChannel | PerBlock | Lpbq


def granularity_of(
    axis: int | None, block_size: int | None, scale_bitwidth: int | None = None
) -> Granularity:
    """The granularity with this channel axis, or this block size, or neither."""
    if block_size is not None:
        return PerBlock(block_size) if scale_bitwidth is None else Lpbq(block_size, scale_bitwidth)
    return PerTensor() if axis is None else PerChannel(axis)


@dataclass(frozen=True)
class Scheme:
    """The request for a grid.

    Args:
        bitwidth: integer bits of a code, one of `BITWIDTHS`.
        symmetric: the offset is fixed at `-2^(bitwidth - 1)`, so that zero is the middle code.
        granularity: how the tensor is divided among scales.
        float_offset: the grid is `q * scale + minimum` with a float minimum (GGUF's Q4_1, Q4_K
            ...), so zero need not be exact. `Encoding`, whose offsets are integers, refuses such a
            scheme, and so does every writer of one; see `float_offset.py`.

    Raises:
        GridError: the bitwidth is not one of `BITWIDTHS`, or the parts contradict each other.
    """

    bitwidth: int
    symmetric: bool = True
    granularity: Granularity = field(default_factory=PerTensor)
    float_offset: bool = False

    def __post_init__(self) -> None:
        if self.symmetric and self.float_offset:
            raise GridError("a symmetric grid has no float offset; say symmetric=False")
        if isinstance(self.granularity, Lpbq) and not self.symmetric:
            raise GridError(
                "blocks with integer scales (LPBQ) are symmetric; say symmetric=True, or use "
                "PerBlock"
            )
        if self.bitwidth not in BITWIDTHS:
            raise GridError(
                f"bitwidth {self.bitwidth} is not one of {BITWIDTHS[0]} to {BITWIDTHS[-1]}"
            )

    @property
    def steps(self) -> int:
        """Number of steps between the lowest and the highest code, `qmax - qmin`."""
        return 2**self.bitwidth - 1

    @property
    def symmetric_offset(self) -> int:
        """The offset of every symmetric grid of this bitwidth (AIMET's convention)."""
        return -(2 ** (self.bitwidth - 1))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of `scale` and `offset` for a tensor of `shape`.

        Raises:
            GridError: the block does not divide the last axis, or the channel axis is not there.
        """
        match self.granularity:
            case PerTensor():
                return ()
            case PerChannel(axis):
                if not -len(shape) <= axis < len(shape):
                    raise GridError(
                        f"channel axis {axis} is outside a tensor of shape {list(shape)}"
                    )
                return (shape[axis],)
            case PerBlock(size) | Lpbq(size):
                if not shape or shape[-1] % size:
                    raise GridError(
                        f"blocks of {size} do not divide the last axis of a tensor of shape "
                        f"{list(shape)}"
                    )
                return (*shape[:-1], shape[-1] // size)

    def to_json(self) -> dict[str, Any]:
        """Plain values: `{bitwidth, symmetric, axis, block_size}`, with `axis` per channel and
        `block_size` per block only.

        `scale_bitwidth` is added for blocks with integer scales, and `float_offset` where it is
        true.
        """
        granularity = self.granularity
        axis = granularity.axis if isinstance(granularity, PerChannel) else None
        block_size = granularity.size if isinstance(granularity, PerBlock | Lpbq) else None
        record: dict[str, Any] = {
            "bitwidth": self.bitwidth,
            "symmetric": self.symmetric,
            "axis": axis,
            "block_size": block_size,
        }
        if isinstance(granularity, Lpbq):
            record["scale_bitwidth"] = granularity.scale_bitwidth
        if self.float_offset:
            record["float_offset"] = True
        return record

    def to_text(self) -> str:
        """`to_json` as JSON text with sorted keys: one text for each scheme, for fingerprints and
        operators. `str` is for people, and may change.
        """
        return json.dumps(self.to_json(), sort_keys=True)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Scheme:
        """Undo `to_json`."""
        granularity = granularity_of(
            record["axis"], record["block_size"], record.get("scale_bitwidth")
        )
        return cls(
            record["bitwidth"], record["symmetric"], granularity, record.get("float_offset", False)
        )

    def __str__(self) -> str:
        match self.granularity:
            case Lpbq(size, bits):
                where = f"block {size} with int{bits} scales"
            case PerBlock(size):
                where = f"block {size}"
            case PerChannel():
                where = "channel"
            case _:
                where = "tensor"
        kind = (
            "symmetric" if self.symmetric else "float-offset" if self.float_offset else "asymmetric"
        )
        return f"int{self.bitwidth} {kind} per {where}"


def parse_scheme(text: str) -> Scheme:
    """Read a short name: `w4-block32`, `w8-channel`, `w4-tensor`, optionally with `-asymmetric` at
    the end; `w4-lpbq64` for blocks with integer scales.

    Raises:
        GridError: the name does not follow the pattern.
    """
    match = re.fullmatch(r"w(\d+)-(?:(block|lpbq)(\d+)|(channel)|(tensor))(-asymmetric)?", text)
    if not match:
        raise GridError(
            f"scheme {text!r} is not understood; write it like w4-block32, w8-channel or "
            "w3-block64-asymmetric"
        )
    bitwidth, block, size, channel, _, asymmetric = match.groups()
    blocks = {"block": PerBlock, "lpbq": Lpbq}
    granularity: Granularity = (
        blocks[block](int(size)) if block else PerChannel(0) if channel else PerTensor()
    )
    return Scheme(int(bitwidth), symmetric=not asymmetric, granularity=granularity)


def short_name(scheme: Scheme) -> str:
    """Undo `parse_scheme`; the description where a scheme has no short name."""
    ending = "" if scheme.symmetric else "-asymmetric"
    match scheme.granularity:
        case _ if scheme.float_offset:
            return str(scheme)
        case PerBlock(size):
            return f"w{scheme.bitwidth}-block{size}{ending}"
        case Lpbq(size, 4):
            return f"w{scheme.bitwidth}-lpbq{size}"
        case PerChannel(0):
            return f"w{scheme.bitwidth}-channel{ending}"
        case PerTensor():
            return f"w{scheme.bitwidth}-tensor{ending}"
        case _:
            return str(scheme)
