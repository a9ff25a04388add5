"""A quantized tensor in memory and on disk: bit-packed codes, and the numbers of the grid in the
narrowest dtype that holds them exactly.

    packed        uint8 [*rows, bytes]   codes, see `packing.py`
    scale         float                  of the granularity's shape; LPBQ: one per row, [*rows, 1]
    block_scale   uint8                  LPBQ only: the integers minus 1, packed along the row
    zero_point    uint8                  asymmetric grids: -offset; packed along the row per block
    minimum       float                  float-offset grids

A float tensor is float16 if that holds all of its numbers, else bfloat16 if that does, else
float32. Blocks of 32 with a float16 scale cost half a bit per weight, a zero point another
`bitwidth / 32`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from qwlora.errors import QwloraWarning
from qwlora.grid.encoding import Encoding, QuantizedTensor, aligned, grouped
from qwlora.grid.packing import pack, packed_row_bytes, unpack
from qwlora.grid.scheme import Blocks, Lpbq, Scheme

# Codes unpacked together, so that the steps in between stay in a core's cache
_AT_ONCE = 2**18


class Parts(NamedTuple):
    """The tensors that are stored; see the module docstring."""

    packed: Tensor
    scale: Tensor
    block_scale: Tensor | None = None
    zero_point: Tensor | None = None
    minimum: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class PackedTensor:
    """A view of the parts under a scheme; `count` codes in a row, `packed` may hold a few more."""

    scheme: Scheme
    count: int
    parts: Parts

    def __repr__(self) -> str:
        return f"PackedTensor({list(self.shape)}, {self.scheme})"

    @classmethod
    def from_quantized(cls, quantized: QuantizedTensor) -> PackedTensor:
        """Pack a copy of `quantized`, without loss; bitwidths above 8 are refused."""
        codes, encoding = quantized.codes, quantized.encoding
        scheme, scale = encoding.scheme, encoding.scale
        block_scale = zero_point = minimum = None
        if isinstance(scheme.granularity, Lpbq):
            scale, integers = scheme.granularity.split(scale)
            block_scale = pack((integers - 1).byte(), scheme.granularity.scale_bitwidth)
        if scheme.float_offset:
            minimum = narrowest(encoding.minimum.clone())
        elif not scheme.symmetric:
            zero_point = (-encoding.offset).byte()
            if isinstance(scheme.granularity, Blocks):
                zero_point = pack(zero_point, scheme.bitwidth)
        packed = pack(codes, scheme.bitwidth)
        parts = Parts(packed, narrowest(scale.clone()), block_scale, zero_point, minimum)
        return cls(scheme, codes.shape[-1], parts)

    @classmethod
    def empty(cls, scheme: Scheme, shape: tuple[int, ...]) -> PackedTensor:
        """Parts without values (on the meta device), to be read from a file."""
        groups, granularity = scheme.scale_shape(shape), scheme.granularity

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float16, device="meta")

        def integers(bitwidth: int, *rows: int) -> Tensor:
            shape = (*rows[:-1], packed_row_bytes(rows[-1], bitwidth)) if rows else ()
            return torch.empty(shape, dtype=torch.uint8, device="meta")

        # float16 stands for any dtype: `load_state_dict(assign=True)` takes that of the file
        parts = Parts(integers(scheme.bitwidth, *shape), floats(*groups))
        if isinstance(granularity, Lpbq):
            block_scale = integers(granularity.scale_bitwidth, *groups)
            parts = parts._replace(scale=floats(*groups[:-1], 1), block_scale=block_scale)
        if scheme.float_offset:
            parts = parts._replace(minimum=floats(*groups))
        elif not scheme.symmetric:
            bits = scheme.bitwidth if isinstance(granularity, Blocks) else 8
            parts = parts._replace(zero_point=integers(bits, *groups))
        return cls(scheme, shape[-1], parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the codes."""
        return (*self.parts.packed.shape[:-1], self.count)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts if part is not None)

    @property
    def codes(self) -> Tensor:
        """uint8 codes."""
        return unpack(self.parts.packed, self.scheme.bitwidth, self.count)

    @property
    def scale(self) -> Tensor:
        """float32, of the granularity's shape; a copy."""
        scale = self.parts.scale.to(torch.float32, copy=True)
        block_scale = self.parts.block_scale
        if block_scale is None:
            return scale
        granularity = self.scheme.granularity
        assert isinstance(granularity, Lpbq)
        blocks = self.count // granularity.size
        return (unpack(block_scale, granularity.scale_bitwidth, blocks).float() + 1) * scale

    @property
    def offset(self) -> Tensor:
        """int32, of the granularity's shape; integer-offset grids only."""
        if (zero_point := self.zero_point) is not None:
            return -zero_point.to(torch.int32)
        groups, middle = self.scheme.scale_shape(self.shape), self.scheme.symmetric_offset
        return torch.full(groups, middle, dtype=torch.int32, device=self.parts.packed.device)

    @property
    def zero_point(self) -> Tensor | None:
        """-offset as uint8, of the granularity's shape; asymmetric integer grids only."""
        zero_point, granularity = self.parts.zero_point, self.scheme.granularity
        if zero_point is not None and isinstance(granularity, Blocks):
            return unpack(zero_point, self.scheme.bitwidth, self.count // granularity.size)
        return None if zero_point is None else zero_point.clone()

    @property
    def encoding(self) -> Encoding:
        """The grid, in float32."""
        minimum = self.parts.minimum
        low_end = self.offset if minimum is None else minimum.to(torch.float32, copy=True)
        return Encoding(self.scheme, self.scale, low_end)

    @property
    def quantized(self) -> QuantizedTensor:
        """Codes and grid, unpacked."""
        return QuantizedTensor(self.codes, self.encoding)

    def dequantize(
        self, dtype: torch.dtype = torch.float32, index: Tensor | slice | int | None = None
    ) -> Tensor:
        """The values, rounded to `dtype`: `values[index]`, where nothing else is unpacked."""
        packed = self.parts.packed
        return self._values(packed if index is None else packed[index], index, dtype)

    def embedding(
        self, index: Tensor, dtype: torch.dtype = torch.float32, padding_idx: int | None = None
    ) -> Tensor:
        """`F.embedding` of a matrix's values: `dequantize` of these rows."""
        # the lookup of packed rows refuses what torch refuses, such as negative or boolean indices
        return self._values(F.embedding(index, self.parts.packed, padding_idx), index, dtype)

    def remainder(self, weight: Tensor) -> Tensor:
        """What rounding left of `weight` [rows, count]: packed codes c of 4 bits for (c - 8) / 16
        of a step, so at most half of one."""
        left = weight.to(self.parts.packed.device).double() - self.dequantize()
        scale = self._broadcast(self.scale.double(), None, self.shape)
        steps = grouped(left, self.scheme.granularity) / scale
        codes = steps.mul_(16).round_().add_(8).clamp_(0, 15).to(torch.uint8)
        return pack(codes.view(self.shape), 4)

    def plus(
        self, left: Tensor, right: Tensor | None = None, remainder: Tensor | None = None
    ) -> PackedTensor:
        """The tensor on the same grid nearest to this matrix plus `left @ right`, [rows, rank] and
        [rank, count]; or plus `left`, [rows, count], if `right` is None.

            codes = clamp(codes + round_half_even(r + left @ right / scale), 0, 2^bitwidth - 1)

        Its values lie on the grid, so only the change is rounded. `r` is `remainder`, or 0; neither
        changes a code where the product is 0.
        """
        packed, shape = torch.empty_like(self.parts.packed), self.shape
        # In float64, the order of a product's sums is 1e-16 of them: codes do not depend on
        # threads, shapes or libraries.
        scale = self._broadcast(self.scale.double(), None, shape)
        left, right = left.double(), None if right is None else right.double()
        step = max(1, _AT_ONCE // max(1, self.count))
        for rows in (slice(start, start + step) for start in range(0, len(packed), step)):
            codes = left[rows].clone() if right is None else left[rows] @ right
            grouped(codes, self.scheme.granularity).div_(_of(scale, rows))
            if remainder is not None:
                sixteenths = unpack(remainder[rows].to(codes.device), 4, self.count)
                codes.add_(sixteenths, alpha=1 / 16).sub_(0.5)
            codes.round_().add_(unpack(self.parts.packed[rows], self.scheme.bitwidth, self.count))
            codes.clamp_(0, self.scheme.steps)
            packed[rows] = pack(codes.to(torch.uint8), self.scheme.bitwidth)
        return replace(self, parts=self.parts._replace(packed=packed))

    def _values(
        self, packed: Tensor, index: Tensor | slice | int | None, dtype: torch.dtype
    ) -> Tensor:
        """The values of `packed`, the packed rows at `index`."""
        # a run that only counts bytes has no values
        if isinstance(packed, FakeTensor):
            return packed.new_empty((*packed.shape[:-1], self.count), dtype=dtype)
        if packed.ndim == 1:
            return self._values(packed.unsqueeze(0), index, dtype).squeeze(0)
        scheme, shape = self.scheme, (*packed.shape[:-1], self.count)
        chosen = self
        if index is not None and isinstance(scheme.granularity, Blocks):  # each row has its own
            parts: Any = (None if part is None else part[index] for part in self.parts)
            chosen = PackedTensor(scheme, self.count, Parts(*parts))
        flat = packed.reshape(-1, packed.shape[-1])
        low = chosen.parts.minimum
        if not scheme.symmetric and low is None:
            low = -cast(Tensor, chosen.zero_point).float()
        scale = self._broadcast(chosen.scale, index, shape)
        low = None if low is None else self._broadcast(low.float(), index, shape)
        values = torch.empty((len(flat), self.count), dtype=dtype, device=packed.device)
        # No float offsets: a GPU may round `code * scale + minimum` once, the CPU rounds twice.
        if compiles(packed.device) and not scheme.float_offset:
            try:
                # `data` and no_grad prevent recompilation for views with other bases, and when
                # gradients are recorded
                tensors = (None if x is None else x.data for x in (values, flat, scale, low))
                with torch.no_grad():
                    _compiled(scheme)(*tensors)
                return values.view(shape)
            except torch._dynamo.exc.TorchDynamoException as error:
                _NO_COMPILER.add(packed.device)
                reason = " ".join(str(error).partition("\n\n")[0].split())
                warnings.warn(
                    f"torch.compile failed on {packed.device} ({reason}), so weights are unpacked "
                    "by torch's operations, which is slower. Install Triton and a C compiler, or "
                    "set TORCH_COMPILE_DISABLE=1 to hide this warning",
                    QwloraWarning,
                    stacklevel=2,
                )
        step = max(1, _AT_ONCE // max(1, self.count))
        for rows in (slice(start, start + step) for start in range(0, len(flat), step)):
            numbers = _of(scale, rows), None if low is None else _of(low, rows)
            _write_values(scheme, values[rows], flat[rows], *numbers)
        return values.view(shape)

    def _broadcast(
        self, part: Tensor, index: Tensor | slice | int | None, shape: tuple[int, ...]
    ) -> Tensor:
        """`part` as `[rows, *tail]`, or `[1, *tail]` if it is the same for all; `tail` broadcasts
        against the grouped codes of a row."""
        if not part.ndim:
            return part
        if isinstance(self.scheme.granularity, Blocks):
            return part.reshape(-1, part.shape[-1], 1)
        part = aligned(part, self.scheme.granularity, len(self.shape))
        if index is not None:
            part = part[index] if part.shape[0] > 1 else part[0]
            part = part.unsqueeze(0) if part.ndim < 2 else part
        if part.numel() == part.shape[-1]:
            return part.reshape(1, -1)
        return part.expand(*shape[:-1], part.shape[-1]).reshape(-1, part.shape[-1])


def _write_values(
    scheme: Scheme, values: Tensor, packed: Tensor, scale: Tensor, low: Tensor | None
) -> None:
    wide = values
    if values.dtype != torch.float32:
        wide = torch.empty(values.shape, device=values.device)
    codes = packed
    # unpack would copy 8-bit codes, which takes 16 % longer
    if scheme.bitwidth < 8:
        codes = unpack(packed, scheme.bitwidth, values.shape[-1])
    wide.copy_(codes)
    blocks = grouped(wide, scheme.granularity)
    offset = scheme.symmetric_offset if low is None else low
    # Subtracting the offset from bytes before the conversion was slower per block
    # (docs/log/grid.md). Code plus offset is exact in float32, so only the product and then the
    # conversion round: compiled and uncompiled values are equal, except with float offsets.
    if scheme.float_offset:
        blocks.mul_(scale).add_(offset)
    else:
        blocks.add_(offset).mul_(scale)
    if values.dtype != torch.float32:
        values.copy_(wide)


# It is a module because torch.compile treats a module's integers as constants, and unpacking
# depends on the bitwidth.
class _ValueWriter(nn.Module):
    def __init__(self, scheme: Scheme):
        super().__init__()
        self.scheme = scheme

    def forward(self, *tensors: Any) -> None:
        _write_values(self.scheme, *tensors)


@cache
def _compiled(scheme: Scheme) -> Callable[..., None]:
    # Each dtype, single rows and equal sizes compile separately. Torch's default limit is 8 for all
    # schemes together; nothing beyond a limit is compiled.
    options: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": 32}
    return torch.compile(_ValueWriter(scheme), dynamic=True, **options)


_NO_COMPILER: set[torch.device] = set()  # where torch.compile has failed


def compiles(device: torch.device) -> bool:
    """Whether weights on `device` are unpacked by compiled kernels."""
    # ROCm's type is cuda too
    return device.type == "cuda" and device not in _NO_COMPILER


def _of(part: Tensor, rows: slice) -> Tensor:
    return part[rows] if part.ndim and len(part) > 1 else part


def narrowest(
    numbers: Tensor, candidates: Sequence[torch.dtype] = (torch.float16, torch.bfloat16)
) -> Tensor:
    """`numbers` in the first candidate dtype that holds all of them exactly, else in float32."""
    for dtype in candidates:
        narrow = numbers.to(dtype)
        if torch.equal(narrow.to(numbers.dtype), numbers):
            return narrow
    return numbers.to(torch.float32)


def compute_dtype(x: Any, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of the product of a packed weight with `x`: autocast's, else `dtype`, else that of
    `x`."""
    # torch refuses an `x` that is no tensor later, in its own words
    if not isinstance(x, Tensor) and dtype is not None:
        return dtype
    kind = x.device.type
    # autocast leaves float64 as it is
    is_cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if is_cast else dtype or x.dtype
