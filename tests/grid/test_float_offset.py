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


def test_a_scheme_takes_one_kind_of_low_end():
    offset = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(GridError, match="its minimum has another type"):
        Encoding(SCHEME, torch.ones(2, 1), offset)
    with pytest.raises(GridError, match=r"int4 asymmetric per .*offset has another type"):
        Encoding(Scheme(4, False, PerBlock(32)), torch.ones(2, 1), torch.zeros(2, 1))


def test_the_low_end_of_integer_offsets_is_their_lowest_value():
    encoding = measure(torch.randn(2, 32), Scheme(4, False, PerBlock(32)))
    zeros = torch.zeros(2, 32, dtype=torch.uint8)
    assert torch.equal(encoding.minimum, encoding.dequantize(zeros)[:, :1])


def test_impossible_ones_are_refused(monkeypatch):
    one = torch.ones(1)
    with pytest.raises(GridError, match=r"a float minimum, which has no integer offset"):
        _ = measure(torch.randn(2, 32), SCHEME).offset
    with pytest.raises(GridError, match="a symmetric grid has no float offset; say symmetric=F"):
        Scheme(4, float_offset=True)
    with pytest.raises(GridError, match="a minimum is not finite"):
        Encoding(SCHEME, one, one * math.inf)
    with pytest.raises(GridError, match="needs scales of shape"):
        Encoding(SCHEME, one, one).quantize(torch.ones(2, 32))
    with pytest.raises(GridError, match="1 of 32 values are nan, which has no code"):
        Encoding(SCHEME, one, one).quantize(torch.tensor([math.nan] + [0.0] * 31))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(GridError, match=r"scale has shape \[1\] but minimum \[2\]"):
        Encoding(SCHEME, one, torch.ones(2))


def test_one_value_is_exact():
    x = torch.full((2, 32), -3.25)
    assert torch.equal(measure(x, SCHEME).fake_quantize(x), x)
