"""The request for a quantized tensor: bitwidth, symmetry, granularity, and how the range of an
activation is estimated. Plain values, free of torch.

A code is an unsigned integer `q` in `[0, 2^bitwidth - 1]`; an encoding (see `encoding.py`) maps it
to `x_hat = (q + offset) * scale`. The granularity says how many scales and offsets a tensor has:

    weight [A, B], PerTensor()           -> scale []
    weight [A, B], PerChannel(axis=0)    -> scale [A]
    weight [A, B], PerBlock(size=32)     -> scale [A, B / 32]   blocks of inputs, the last axis
    weight [A, B], SignedBlock(32)       -> scale [A, B / 32]   the same, of either sign
    weight [A, B], Lpbq(32)              -> scale [A, B / 32]   each an integer times a row scale

A new grid is a subclass of `Blocks`. Formats that store a float scale per block hold it.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from qwlora.errors import CalibrationError, GridError

if TYPE_CHECKING:
    from torch import Tensor

BITWIDTHS = range(2, 17)


class _Granularity:
    kind: ClassVar[str]
    # whether solvers may choose each scale by itself; they round it to float16 at least
    is_free: ClassVar[bool] = False
    is_signed: ClassVar[bool] = False
    is_only_symmetric: ClassVar[bool] = False

    def nearest(self, scale: Tensor) -> Tensor:
        """The nearest scales that the grid allows; by default any."""
        return scale


@dataclass(frozen=True)
class PerTensor(_Granularity):
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel(_Granularity):
    """One scale for every index of `axis`: weight [A, B], axis 0 -> scale [A]."""

    axis: int = 0

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class Blocks(_Granularity):
    """One scale per `size` neighbors along the last axis: weight [A, B] -> scale [A, B / size]."""

    size: int
    KINDS: ClassVar[dict[str, type[Blocks]]] = {}

    def __init_subclass__(cls, kind: str) -> None:
        cls.kind = kind
        Blocks.KINDS[kind] = cls

    def __post_init__(self) -> None:
        if self.size < 1:
            raise GridError(f"a block holds at least one value, not {self.size}")

    def to_json(self) -> dict[str, Any]:
        """The entries of `Scheme.to_json` that describe the blocks."""
        values = asdict(self)
        # Fingerprints hash this text. The two kinds that came first are told apart by
        # scale_bitwidth, and a name for them would change the fingerprint of every base.
        kind = {} if self.kind in ("block", "lpbq") else {"kind": self.kind}
        return {"block_size": values.pop("size"), **kind, **values}

    def __str__(self) -> str:
        return f"{self.kind} {self.size}"


@dataclass(frozen=True)
class PerBlock(Blocks, kind="block"):
    """Blocks with positive float scales: weight [A, B] -> scale [A, B / size]."""

    is_free: ClassVar[bool] = True


@dataclass(frozen=True)
class SignedBlock(Blocks, kind="signed"):
    """Blocks with any nonzero scales. A symmetric grid has one code more below zero than above; a
    negative scale turns it around, for blocks whose largest weight is positive:

        scale > 0    -2^(b-1) s ... (2^(b-1) - 1) s
        scale < 0    (2^(b-1) - 1) s ... -2^(b-1) s

    As llama.cpp's Q4_0 and Q5_0 (`d = max / -8`), and AutoRound.
    """

    is_free: ClassVar[bool] = True
    is_signed: ClassVar[bool] = True
    is_only_symmetric: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"signed block {self.size}"


@dataclass(frozen=True)
class Bf16Block(PerBlock, kind="bf16block"):
    """Blocks whose scales are bfloat16, as XNNPACK stores them, without offsets."""

    is_only_symmetric: ClassVar[bool] = True

    def nearest(self, scale: Tensor) -> Tensor:
        return scale.bfloat16().to(scale.dtype)

    def __str__(self) -> str:
        return f"bfloat16 block {self.size}"


@dataclass(frozen=True)
class Lpbq(Blocks, kind="lpbq"):
    """AIMET's low-power blocks: each block scale is an integer in `[1, 2^scale_bitwidth]` times the
    float scale of its row.

        weight [A, B] -> scale [A, B / size] = integers n [A, B / size] * row scale r [A, 1]
        r = max over the row's blocks of scale / 2^scale_bitwidth
        n = clamp(round_half_even(scale / r), 1, 2^scale_bitwidth)

    AIMET's "decompressed bitwidth" is `bitwidth + scale_bitwidth`.
    """

    scale_bitwidth: int = 4
    is_only_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.scale_bitwidth <= 8:
            raise GridError(f"a block's integer scale has 1 to 8 bits, not {self.scale_bitwidth}")

    def nearest(self, scale: Tensor) -> Tensor:
        row, integers = self._factors(scale)
        return integers * row

    def split(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(row scales [*rows, 1], integers [*rows, blocks]); their product is `scale`, bit for
        bit."""
        row, integers = self._factors(scale)
        if wrong := int((integers * row != scale).sum()):
            raise GridError(
                f"{wrong} of {scale.numel()} block scales are not an integer times their row's "
                "scale; pass them through Lpbq.nearest first"
            )
        return row, integers.int()

    def _factors(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        # A row's largest block has the largest integer. So the row's scale follows from the block
        # scales alone, and an encoding stores nothing more.
        largest = 2**self.scale_bitwidth
        row = scale.amax(-1, keepdim=True) / largest
        return row, (scale / row).round().clamp(1, largest)

    def __str__(self) -> str:
        return f"block {self.size} with int{self.scale_bitwidth} scales"


Granularity = PerTensor | PerChannel | Blocks


@dataclass(frozen=True)
class Scheme:
    """The request for a grid.

    Args:
        bitwidth: integer bits of a code, one of `BITWIDTHS`.
        symmetric: the offset is fixed at `-2^(bitwidth - 1)`, so that zero is the middle code.
        granularity: how the tensor is divided among scales.
        float_offset: the grid is `q * scale + minimum` with a float minimum (GGUF's Q4_1, Q4_K
            ...), so zero need not be exact.
    """

    bitwidth: int
    symmetric: bool = True
    granularity: Granularity = field(default_factory=PerTensor)
    float_offset: bool = False

    def __post_init__(self) -> None:
        if self.symmetric and self.float_offset:
            raise GridError("a symmetric grid has no float offset; say symmetric=False")
        if self.granularity.is_only_symmetric and not self.symmetric:
            raise GridError(
                f"{self.granularity.kind} grids have no offsets; remove -asymmetric (in Python, "
                "symmetric=False), or use block (PerBlock)"
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
        """Shape of `scale` and `offset` for a tensor of `shape`."""
        match self.granularity:
            case PerTensor():
                return ()
            case PerChannel(axis):
                if not -len(shape) <= axis < len(shape):
                    raise GridError(f"channel axis {axis} is outside of shape {list(shape)}")
                return (shape[axis],)
            case Blocks(size):
                if not shape or shape[-1] % size:
                    raise GridError(
                        f"blocks of {size} do not divide the last axis of a tensor of shape "
                        f"{list(shape)}"
                    )
                return (*shape[:-1], shape[-1] // size)

    def to_json(self) -> dict[str, Any]:
        """Plain values: `{bitwidth, symmetric, axis, block_size}`; `axis` per channel, `block_size`
        and further fields per block."""
        granularity = self.granularity
        record: dict[str, Any] = {
            "bitwidth": self.bitwidth,
            "symmetric": self.symmetric,
            "axis": granularity.axis if isinstance(granularity, PerChannel) else None,
            "block_size": None,
        }
        if isinstance(granularity, Blocks):
            record |= granularity.to_json()
        # only where it is true: older records, which fingerprints hash, do not have the key
        if self.float_offset:
            record["float_offset"] = True
        return record

    def to_text(self) -> str:
        """`to_json` with sorted keys: one text for each scheme, for fingerprints and operators."""
        # `str` is for people, and may change
        return json.dumps(self.to_json(), sort_keys=True)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Scheme:
        """Undo `to_json`.

        Raises:
            GridError: entries are missing, have the wrong type, or contradict each other.
        """
        try:
            bitwidth, symmetric, size = (record[k] for k in ("bitwidth", "symmetric", "block_size"))
            granularity: Granularity
            if size is not None:
                kind = record.get("kind", "lpbq" if "scale_bitwidth" in record else "block")
                if kind not in Blocks.KINDS:
                    raise GridError(f"block kind {kind!r} is not one of {', '.join(Blocks.KINDS)}")
                blocks = Blocks.KINDS[kind]
                more = {f.name: record[f.name] for f in fields(blocks) if f.name in record}
                granularity = blocks(size, **more)
            else:
                granularity = PerTensor() if record["axis"] is None else PerChannel(record["axis"])
        except (KeyError, TypeError) as error:
            raise GridError(f"{record} is not a scheme as Scheme.to_json writes it") from error
        return cls(bitwidth, symmetric, granularity, record.get("float_offset", False))

    def __str__(self) -> str:
        kind = "float-offset" if self.float_offset else "asymmetric"
        kind = "symmetric" if self.symmetric else kind
        return f"int{self.bitwidth} {kind} per {self.granularity}"


def parse_scheme(text: str) -> Scheme:
    """Read a short name: `w4-block32`, `w8-channel`, `w4-tensor`, optionally with `-asymmetric` at
    the end; `w4-lpbq64` for blocks with integer scales."""
    kinds = "|".join(Blocks.KINDS)
    match = re.fullmatch(rf"w(\d+)-(?:({kinds})(\d+)|(channel)|(tensor))(-asymmetric)?", text)
    if not match:
        raise GridError(
            f"scheme {text!r} is not understood; write it like w4-block32, w8-channel or "
            "w3-block64-asymmetric"
        )
    bitwidth, kind, size, channel, _, asymmetric = match.groups()
    granularity: Granularity = (
        Blocks.KINDS[kind](int(size)) if kind else PerChannel(0) if channel else PerTensor()
    )
    return Scheme(int(bitwidth), symmetric=not asymmetric, granularity=granularity)


def similar_schemes(scheme: Scheme) -> list[Scheme]:
    """`scheme` with 2 to 8 bits, and if it has blocks with these of 32, 64 and 128 as well."""
    granularities = [scheme.granularity]
    if isinstance(scheme.granularity, Blocks):
        sizes = sorted({32, 64, 128, scheme.granularity.size})
        granularities = [replace(scheme.granularity, size=size) for size in sizes]
    return [
        replace(scheme, bitwidth=bitwidth, granularity=granularity)
        for bitwidth in range(2, 9)
        for granularity in granularities
    ]


def short_name(scheme: Scheme) -> str:
    """Undo `parse_scheme`; the description where a scheme has no short name."""
    where = str(scheme.granularity)
    if isinstance(scheme.granularity, Blocks):
        where = f"{scheme.granularity.kind}{scheme.granularity.size}"
    name = f"w{scheme.bitwidth}-{where}{'' if scheme.symmetric else '-asymmetric'}"
    return name if parse_scheme(name) == scheme else str(scheme)


EstimatorName = Literal["min-max", "percentile", "squared-error", "sqnr"]
ESTIMATORS: tuple[str, ...] = get_args(EstimatorName)


@dataclass(frozen=True)
class RangeEstimator:
    """How the range of an activation is chosen from an observer's statistics.

    min-max         the lowest and the highest value
    percentile      leaves (100 - percentile) % of the values outside at either end
    squared-error   the least sum of (x - x_hat)^2
    sqnr            the same, with clipped values counted three times
                    (AIMET's `post_training_tf_enhanced`)
    """

    name: str = "min-max"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.name not in ESTIMATORS:
            raise CalibrationError(f"observer {self.name!r} is not one of {', '.join(ESTIMATORS)}")
        if not 50 < self.percentile <= 100:
            raise CalibrationError(f"percentile {self.percentile} is not in (50, 100]")

    @property
    def needs_histogram(self) -> bool:
        """Whether the estimator reads a histogram of the values, not only their extremes."""
        return self.name != "min-max"

    @property
    def gamma(self) -> float:
        """Weight of the squared error of a clipped value."""
        return 3.0 if self.name == "sqnr" else 1.0


def as_estimator(observer: str | RangeEstimator) -> RangeEstimator:
    """An estimator by name, with its default parameters."""
    return RangeEstimator(observer) if isinstance(observer, str) else observer
