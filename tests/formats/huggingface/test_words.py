"""Codes in 32-bit words: one little-endian bit stream a row."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qwlora.formats.huggingface.int32_words import unpack_words


@st.composite
def codes(draw):
    bitwidth = draw(st.integers(1, 8))
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40))
    return bitwidth, draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bitwidth - 1)))


@settings(deadline=None)
@given(codes())
def test_a_row_is_one_little_endian_bit_stream(case):
    bitwidth, q = case
    words = -(-q.shape[1] * bitwidth // 32)
    streams = [
        sum(int(code) << (bitwidth * i) for i, code in enumerate(row)).to_bytes(4 * words, "little")
        for row in q
    ]
    packed = torch.from_numpy(
        np.frombuffer(b"".join(streams), dtype="<i4").reshape(len(q), words).copy()
    )
    assert torch.equal(unpack_words(packed, bitwidth, q.shape[1]), torch.from_numpy(q))


def test_no_codes():
    assert unpack_words(torch.zeros(2, 0, dtype=torch.int32), 3, 0).shape == (2, 0)
