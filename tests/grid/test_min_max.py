import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwlora.errors import CalibrationError, GridError
from qwlora.grid.encoding import encoding_from_range, group_range, measure
from qwlora.grid.scheme import BITWIDTHS, PerBlock, PerChannel, PerTensor, Scheme

from .strategies import brief, cases, thorough

EVERY = [PerTensor(), PerChannel(0), PerChannel(-1), PerBlock(2)]


@thorough
@given(cases())
def test_range_holds_every_value_and_no_more(case):
    x, scheme = case
    low, high = group_range(x, scheme)
    assert low.shape == high.shape == scheme.scale_shape(tuple(x.shape))
    assert low.min() == x.min()
    assert high.max() == x.max()


@pytest.mark.parametrize("bitwidth", BITWIDTHS)
def test_scale_by_hand(bitwidth):
    x, steps = torch.tensor([-3.0, 5.0]), 2**bitwidth - 1
    symmetric, asymmetric = (measure(x, Scheme(bitwidth, kind)) for kind in (True, False))
    # the negative end has one code more
    widest = max(5 / (2 if bitwidth == 2 else 2 ** (bitwidth - 1) - 1), 3 / 2 ** (bitwidth - 1))
    assert float(symmetric.scale) == pytest.approx(widest, rel=3e-7)
    assert int(symmetric.offset) == -(2 ** (bitwidth - 1))
    assert float(asymmetric.scale) == pytest.approx(8 / steps, rel=3e-7)
    assert int(asymmetric.offset) == round(-3 / (8 / steps))


@pytest.mark.parametrize("granularity", EVERY)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bitwidth", BITWIDTHS)
def test_zero_is_exact_and_one_value_is_within_half_a_step(bitwidth, symmetric, granularity):
    scheme, x = Scheme(bitwidth, symmetric, granularity), torch.zeros(3, 4)
    encoding = measure(x, scheme)
    smallest = min(torch.finfo(torch.float32).eps, 0.01 / (2**bitwidth - 1))
    assert encoding.scale.numpy() == pytest.approx(smallest, rel=1e-5)
    assert torch.equal(encoding.fake_quantize(x), x)
    for value in (2.5, -2.5, 1e-20, -1e30) if bitwidth > 2 else ():  # two bits clip
        x = torch.full((3, 4), value)
        encoding = measure(x, scheme)
        assert (encoding.fake_quantize(x) - x).abs().max() <= 0.5001 * encoding.scale.max()


WIDE = torch.tensor([-3e38, 3e38])


@pytest.mark.parametrize(
    ("x", "granularity", "message"),
    [
        *(
            (torch.tensor([[1.0, 1, bad, 1]]), granularity, "observed range is not finite")
            for granularity in EVERY
            for bad in (math.inf, -math.inf, math.nan)
        ),
        (WIDE, PerTensor(), "the observed range is wider than float32 can hold"),
        (torch.empty(0, 4), PerTensor(), r"shape \[0, 4\] holds no values to measure"),
        (torch.ones(2, 4), PerBlock(3), "blocks of 3 do not divide the last axis"),
    ],
)
def test_what_cannot_be_measured_is_refused(x, granularity, message):
    with pytest.raises((CalibrationError, GridError), match=message):
        measure(x, Scheme(8, granularity=granularity))


@brief
@given(st.floats(0.0625, 1e6), st.floats(0.0625, 1e6))
def test_a_range_on_one_side_of_zero_still_holds_zero(near, width):
    low, high = torch.tensor(near), torch.tensor(near + width)
    above = encoding_from_range(low, high, Scheme(8, symmetric=False))
    assert int(above.offset) == 0
    below = encoding_from_range(-high, -low, Scheme(8, symmetric=False))
    assert int(below.offset) == -255
    assert torch.equal(above.scale, below.scale)
