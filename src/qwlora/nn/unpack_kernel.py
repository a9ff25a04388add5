"""A Triton kernel that unpacks a packed weight on a GPU, in one pass.

    values[r, j] = (code[r, j] + offset) * scale        or, with a float offset,
    values[r, j] = code[r, j] * scale + minimum

It reads the parts of a `PackedTensor` as they are stored, zero points and LPBQ's integers packed as
well, and writes the values in the dtype of the product, which cuBLAS computes. Torch's operations
(`PackedTensor.dequantize`) pass through memory a dozen times for the same.

The values are the CPU's, bit for bit: each operation rounds once, in float32, then the result is
rounded to the dtype. Tests compare the two in Triton's interpreter (TRITON_INTERPRET=1), without a
GPU. The number of values of a program is a guess: nobody has measured it on a GPU yet.

Importing this module needs Triton, which torch's builds for CUDA and ROCm install.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwlora.grid.scheme import Blocks, Lpbq, Scheme

_COLUMNS = 512  # values that a program writes, of one row


@triton.jit  # type: ignore[untyped-decorator]
def _code(row, row_bytes, j, mask, BITS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Code `j` of the packed row of `row_bytes` at `row`; for the planes, see `grid/packing.py`.

    BITS without its lowest planes is where a plane's bits are in the code, and of BITS bits of a
    code the share that the planes before it take.
    """
    code = j & 0
    if BITS & 8:
        code += tl.load(row + j, mask=mask, other=0)
    if BITS & 4:
        byte = tl.load(row + j // 2, mask=mask, other=0).to(tl.int32)
        code += byte >> (j % 2 * 4) & 15
    if BITS & 2:
        byte = tl.load(row + row_bytes * (BITS & 4) // BITS + j // 4, mask=mask, other=0)
        code += (byte.to(tl.int32) >> (j % 4 * 2) & 3) << (BITS & 4)
    if BITS & 1:
        byte = tl.load(row + row_bytes * (BITS & 6) // BITS + j // 8, mask=mask, other=0)
        code += (byte.to(tl.int32) >> (7 - j % 8) & 1) << (BITS & 6)
    return code


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(  # type: ignore[no-untyped-def]
    values,
    packed,
    scale,
    block_scale,
    zero_point,
    minimum,
    count,
    row_bytes,
    scale_step,
    block_scale_step,
    zero_point_step,
    minimum_step,
    size,
    scale_size,
    OFFSET: tl.constexpr,  # noqa: N803 (Triton's habit for constants)
    BITS: tl.constexpr,  # noqa: N803
    SCALE_BITS: tl.constexpr,  # noqa: N803
    ZERO_BITS: tl.constexpr,  # noqa: N803
    IS_BFLOAT16: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """COLUMNS values of a row. A `step` leads from a row's numbers to those of the next, or is 0;
    `size` neighbors share a number."""
    r = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = j < count
    wide = _code(packed + r * row_bytes, row_bytes, j, mask, BITS).to(tl.float32)
    step = tl.load(scale + r * scale_step + j // scale_size, mask=mask, other=0).to(tl.float32)
    group = j // size
    if SCALE_BITS:
        integers = block_scale + r * block_scale_step
        step *= _code(integers, block_scale_step, group, mask, SCALE_BITS).to(tl.float32) + 1
    if minimum is not None:
        low = tl.load(minimum + r * minimum_step + group, mask=mask, other=0)
        wide = wide * step + low.to(tl.float32)
    elif ZERO_BITS:
        zero = _code(zero_point + r * zero_point_step, zero_point_step, group, mask, ZERO_BITS)
        wide = (wide - zero.to(tl.float32)) * step
    else:
        wide = (wide + OFFSET) * step
    place = values + r * count + j
    if IS_BFLOAT16:
        # Half to even, on the bits: the interpreter would truncate, and GPUs before Ampere have no
        # instruction for it.
        bits = wide.to(tl.int32, bitcast=True)
        tl.store(place, ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(place, wide.to(values.dtype.element_ty), mask=mask)


def unpack_rows(
    scheme: Scheme, packed: Tensor, numbers: list[Tensor | None], count: int, dtype: torch.dtype
) -> Tensor:
    """Values [rows, count] of `packed` [rows, bytes].

    Args:
        numbers: scale, block scale, zero point and minimum as stored, each one number, or
            [rows, numbers], or [1, numbers] if all rows have the same.
    """
    rows, row_bytes = packed.shape
    values = torch.empty((rows, count), dtype=dtype, device=packed.device)
    if not values.numel():
        return values
    numbers = [None if part is None else part.contiguous() for part in numbers]
    each = [1 if p is None or not p.ndim else p.numel() // len(p) for p in numbers]
    steps = [
        n if p is not None and p.ndim and len(p) == rows else 0
        for p, n in zip(numbers, each, strict=True)
    ]
    blocks = scheme.granularity if isinstance(scheme.granularity, Blocks) else None
    size = blocks.size if blocks else count // each[0]
    is_bfloat16, columns = dtype == torch.bfloat16, min(_COLUMNS, triton.next_power_of_2(count))
    with torch.cuda.device_of(packed):  # Triton launches on the current device
        _unpack[(rows, triton.cdiv(count, columns))](
            values.view(torch.int16) if is_bfloat16 else values,
            packed.contiguous(),
            *numbers,
            *(count, row_bytes, *steps),
            *(size, count if isinstance(blocks, Lpbq) else size),
            OFFSET=scheme.symmetric_offset,
            BITS=scheme.bitwidth,
            SCALE_BITS=blocks.scale_bitwidth if isinstance(blocks, Lpbq) else 0,
            ZERO_BITS=0 if numbers[2] is None else scheme.bitwidth if blocks else 8,
            IS_BFLOAT16=is_bfloat16,
            COLUMNS=columns,
            enable_fp_fusion=False,  # code * scale + minimum rounds twice on the CPU
        )
    return values
