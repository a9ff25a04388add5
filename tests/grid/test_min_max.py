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
    widest = max(5 / (2 if bitwidth == 2 else 2 ** (bitwidth - 1) - 1), 3 / 2 ** (bitwidth - 1))
    assert float(symmetric.scale) == pytest.approx(widest, rel=3e-7)
    assert int(symmetric.offset) == -(2 ** (bitwidth - 1))
    assert float(asymmetric.scale) == pytest.approx(8 / steps, rel=3e-7)
    assert int(asymmetric.offset) == round(-3 / (8 / steps))


def test_the_negative_end_has_one_code_more():
    x = torch.tensor([-8.0, 7.0])
    assert float(measure(x, Scheme(4)).scale) == 1.0
    assert torch.equal(measure(x, Scheme(4)).fake_quantize(x), x)


@pytest.mark.parametrize("granularity", EVERY)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bitwidth", BITWIDTHS)
def test_all_zero_is_exact_and_has_the_smallest_scale(bitwidth, symmetric, granularity):
    x = torch.zeros(3, 4)
    encoding = measure(x, Scheme(bitwidth, symmetric, granularity))
    smallest = min(torch.finfo(torch.float32).eps, 0.01 / (2**bitwidth - 1))
    assert encoding.scale.numpy() == pytest.approx(smallest, rel=1e-5)
    assert torch.equal(encoding.fake_quantize(x), x)


@pytest.mark.parametrize("granularity", EVERY)
@pytest.mark.parametrize("value", [2.5, -2.5, 1e-20, -1e30])
def test_one_value_is_represented_within_half_a_step(value, granularity):
    x = torch.full((3, 4), value)
    for symmetric in (True, False):
        encoding = measure(x, Scheme(8, symmetric, granularity))
        assert (encoding.fake_quantize(x) - x).abs().max() <= 0.5001 * encoding.scale.max()


@pytest.mark.parametrize("granularity", EVERY)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_are_refused(bad, granularity):
    x = torch.ones(3, 4)
    x[1, 2] = bad
    with pytest.raises(CalibrationError, match="the observed range is not finite"):
        measure(x, Scheme(8, granularity=granularity))


def test_no_data_and_a_range_too_wide_for_float32_are_refused():
    with pytest.raises(CalibrationError, match="the observed range is wider than float32 can hold"):
        measure(torch.tensor([-3e38, 3e38]), Scheme(8))
    with pytest.raises(CalibrationError, match=r"shape \[0, 4\] holds no values to measure"):
        measure(torch.empty(0, 4), Scheme(8))


def test_a_granularity_that_does_not_fit_is_refused():
    for act in (measure, group_range):
        with pytest.raises(GridError, match="blocks of 3 do not divide the last axis"):
            act(torch.ones(2, 4), Scheme(4, granularity=PerBlock(3)))


@brief
@given(st.floats(0.0625, 1e6), st.floats(0.0625, 1e6))
def test_a_range_on_one_side_of_zero_still_holds_zero(near, width):
    low, high = torch.tensor(near), torch.tensor(near + width)
    above = encoding_from_range(low, high, Scheme(8, symmetric=False))
    assert int(above.offset) == 0
    below = encoding_from_range(-high, -low, Scheme(8, symmetric=False))
    assert int(below.offset) == -255
    assert torch.equal(above.scale, below.scale)
