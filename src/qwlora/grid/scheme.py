"""What is asked of a quantized tensor: bitwidth, symmetry, granularity. Plain values, no tensors, no torch.

A code is an unsigned integer `q` in `[0, 2^bitwidth - 1]`; an encoding (see `encoding.py`) turns it into `x_hat = (q + offset) * scale`. How many scales and
offsets a tensor has is its granularity:

    weight [A, B], PerTensor()           -> scale []
    weight [A, B], PerChannel(axis=0)    -> scale [A]
    weight [A, B], PerBlock(size=32)     -> scale [A, B / 32]      blocks run along the last axis, a Linear's input
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from qwlora.errors import GridError

BITWIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for every index of `axis`: weight [A, B], axis 0 -> scale [A]."""

    axis: int = 0


@dataclass(frozen=True)
class PerBlock:
    """One scale for every `size` neighbours along the last axis: weight [A, B] -> scale [A, B / size]."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise GridError(f"a block holds at least one value, not {self.size}")


Granularity = PerTensor | PerChannel | PerBlock


def granularity_of(axis: int | None, block_size: int | None) -> Granularity:
    """The granularity with this channel axis, or this block size, or neither."""
    if block_size is not None:
        return PerBlock(block_size)
    return PerTensor() if axis is None else PerChannel(axis)


@dataclass(frozen=True)
class Scheme:
    """The request for a grid.

    Args:
        bitwidth: integer bits of a code, one of `BITWIDTHS`.
        symmetric: the offset is fixed at `-2^(bitwidth - 1)`, so that zero is the middle code.
        granularity: how the tensor is divided among scales.

    Raises:
        GridError: the bitwidth is not one of `BITWIDTHS`.
    """

    bitwidth: int
    symmetric: bool = True
    granularity: Granularity = field(default_factory=PerTensor)

    def __post_init__(self) -> None:
        if self.bitwidth not in BITWIDTHS:
            raise GridError(f"bitwidth {self.bitwidth} is not one of {', '.join(map(str, BITWIDTHS))}")

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
                    raise GridError(f"channel axis {axis} is outside a tensor of shape {list(shape)}")
                return (shape[axis],)
            case PerBlock(size):
                if not shape or shape[-1] % size:
                    raise GridError(f"blocks of {size} do not divide the last axis of a tensor of shape {list(shape)}")
                return (*shape[:-1], shape[-1] // size)

    def to_json(self) -> dict[str, Any]:
        """Plain values: `{bitwidth, symmetric, axis, block_size}`, with `axis` per channel and `block_size` per block only."""
        axis = self.granularity.axis if isinstance(self.granularity, PerChannel) else None
        block_size = self.granularity.size if isinstance(self.granularity, PerBlock) else None
        return {"bitwidth": self.bitwidth, "symmetric": self.symmetric, "axis": axis, "block_size": block_size}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Scheme:
        """Undo `to_json`."""
        return cls(record["bitwidth"], record["symmetric"], granularity_of(record["axis"], record["block_size"]))

    def __str__(self) -> str:
        where = {PerTensor: "tensor", PerChannel: "channel"}.get(type(self.granularity))
        where = where or f"block {self.granularity.size}"  # type: ignore[union-attr]
        return f"int{self.bitwidth} {'symmetric' if self.symmetric else 'asymmetric'} per {where}"


def parse_scheme(text: str) -> Scheme:
    """Read a short name: `w4-block32`, `w8-channel`, `w4-tensor`, with `-asymmetric` behind it where wanted.

    Raises:
        GridError: the name does not follow the pattern.
    """
    match = re.fullmatch(r"w(\d+)-(?:block(\d+)|(channel)|(tensor))(-asymmetric)?", text)
    if not match:
        raise GridError(f"scheme {text!r} is not understood; write it like w4-block32, w8-channel or w3-block64-asymmetric")
    bitwidth, block, channel, _, asymmetric = match.groups()
    granularity: Granularity = PerBlock(int(block)) if block else PerChannel(0) if channel else PerTensor()
    return Scheme(int(bitwidth), symmetric=not asymmetric, granularity=granularity)
