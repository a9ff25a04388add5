import math

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwlora.errors import GridError
from qwlora.grid.encoding import Encoding, measure
from qwlora.grid.scheme import PerBlock, PerChannel, PerTensor, Scheme

from .strategies import brief, matrices

SCHEME = Scheme(4, False, PerBlock(32), float_offset=True)


@brief
@given(
    matrices(columns=8),
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from([PerTensor(), PerChannel(0), PerBlock(4)]),
)
def test_every_value_is_within_half_a_step_and_the_lowest_is_exact(x, bitwidth, granularity):
    encoding = measure(x, Scheme(bitwidth, False, granularity, float_offset=True))
    error = (encoding.fake_quantize(x) - x).abs()
    assert (error <= 0.5001 * encoding.scale.max() + 2**-21 * x.abs().max()).all()
    assert encoding.fake_quantize(x).min() == x.min()
    codes = encoding.quantize(x)
    assert codes.max() <= 2**bitwidth - 1
    assert torch.equal(encoding.dequantize(codes), encoding.fake_quantize(x))
    one = torch.full((2, 8), float(x[0, 0]))
    assert torch.equal(measure(one, encoding.scheme).fake_quantize(one), one)


ONE, WIDE = torch.ones(1), torch.randn(2, 32)
PLAIN, OFFSETS = Scheme(4, False, PerBlock(32)), torch.zeros(2, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Encoding(SCHEME, torch.ones(2, 1), OFFSETS), "minimum has another type"),
        (lambda: Encoding(PLAIN, torch.ones(2, 1), torch.zeros(2, 1)), "offset has another type"),
        (lambda: measure(WIDE, SCHEME).offset, "a float minimum, which has no integer offset"),
        (lambda: Scheme(4, float_offset=True), "a symmetric grid has no float offset"),
        (lambda: Encoding(SCHEME, ONE, ONE * math.inf), "a minimum is not finite"),
        (lambda: Encoding(SCHEME, ONE, ONE).quantize(WIDE), "needs scales of shape"),
        (
            lambda: Encoding(SCHEME, ONE, ONE).quantize(WIDE[0] * math.nan),
            "32 of 32 values are nan",
        ),
        (lambda: Encoding(SCHEME, ONE, torch.ones(2)), r"scale has shape \[1\] but minimum \[2\]"),
    ],
)
def test_impossible_ones_are_refused(act, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(GridError, match=message):
        act()


def test_values_are_those_of_ggufs_q4_1():
    gguf = pytest.importorskip("gguf")
    x = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    # a block: float16 scale and minimum, then code j low and code j + 16 high in byte j
    stored = gguf.quantize(x, kind).reshape(6, 2, 20)
    scale, minimum = (
        torch.from_numpy(stored[..., i : i + 2].copy().view(np.float16)[..., 0].astype(np.float32))
        for i in (0, 2)
    )
    low, high = stored[..., 4:] & 0xF, stored[..., 4:] >> 4
    codes = torch.from_numpy(np.concatenate([low, high], axis=-1).reshape(6, 64))
    ours = Encoding(SCHEME, scale, minimum).dequantize(codes)
    assert torch.equal(ours, torch.from_numpy(gguf.dequantize(gguf.quantize(x, kind), kind)))
