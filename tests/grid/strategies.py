"""Tensors and schemes for hypothesis."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from qwlora.grid.scheme import BITWIDTHS, PerBlock, PerChannel, PerTensor, Scheme, SignedBlock

thorough = settings(deadline=None, max_examples=150)
brief = settings(deadline=None, max_examples=40)

magnitudes = st.sampled_from([1e-3, 1.0, 300.0])


@st.composite
def matrices(draw: st.DrawFn, rows: int | None = None, columns: int | None = None) -> Tensor:
    """Float32 [rows, columns] with ties, zeros and one magnitude."""
    shape = (rows or draw(st.integers(1, 4)), columns or draw(st.sampled_from([1, 2, 4, 6, 8])))
    units = st.floats(-1, 1, width=32, allow_subnormal=False)
    return torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=units))) * draw(magnitudes)


@st.composite
def schemes_for(
    draw: st.DrawFn, shape: tuple[int, ...], bitwidths: Sequence[int] = BITWIDTHS
) -> Scheme:
    """A scheme that fits tensors of `shape`."""
    sizes = [size for size in range(1, shape[-1] + 1) if shape[-1] % size == 0]
    axes = range(-len(shape), len(shape))
    granularity = draw(
        st.one_of(
            st.just(PerTensor()),
            st.sampled_from([PerChannel(a) for a in axes]),
            st.sampled_from([blocks(s) for s in sizes for blocks in (PerBlock, SignedBlock)]),
        )
    )
    symmetric = isinstance(granularity, SignedBlock) or draw(st.booleans())
    return Scheme(draw(st.sampled_from(bitwidths)), symmetric, granularity)


@st.composite
def cases(draw: st.DrawFn, bitwidths: Sequence[int] = BITWIDTHS) -> tuple[Tensor, Scheme]:
    """A vector, a matrix or a stack of matrices, and a scheme that fits it."""
    x = draw(matrices())
    match draw(st.integers(1, 3)):
        case 1:
            x = x[0]
        case 3:
            x = torch.stack([x, -0.5 * x, x.flip(-1)])
    return x, draw(schemes_for(tuple(x.shape), bitwidths))
