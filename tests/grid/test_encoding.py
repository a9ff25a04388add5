import math

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwlora.errors import CalibrationError, GridError
from qwlora.grid.encoding import Encoding, aligned, encoding_from_range, grouped, measure
from qwlora.grid.scheme import (
    BITWIDTHS,
    PerBlock,
    PerChannel,
    PerTensor,
    Scheme,
    SignedBlock,
)

from .strategies import brief, cases, matrices, thorough

EVERY = [PerTensor(), PerChannel(0), PerChannel(-1), PerBlock(2)]


def per_value(parameter: torch.Tensor, scheme: Scheme, x: torch.Tensor) -> torch.Tensor:
    """A scale or offset for each value of `x`."""
    shape = grouped(x, scheme.granularity).shape
    return aligned(parameter, scheme.granularity, x.ndim).expand(shape).reshape(x.shape)


@thorough
@given(cases())
def test_error_is_at_most_half_a_step_inside_the_grid(case):
    x, scheme = case
    encoding = measure(x, scheme)
    scale, offset = (per_value(p, scheme, x).double() for p in (encoding.scale, encoding.offset))
    first, last = offset * scale, (offset + scheme.steps) * scale
    low, high = torch.minimum(first, last), torch.maximum(first, last)
    inside = x.double().clamp(low, high).float()
    error = (encoding.fake_quantize(inside).double() - inside).abs()
    assert (error <= scale.abs() / 2 + 2**-22 * inside.abs()).all()


@thorough
@given(cases(bitwidths=BITWIDTHS[1:]))
def test_measured_grid_reaches_both_ends(case):
    x, scheme = case
    encoding = measure(x, scheme)
    # an asymmetric grid is shifted by up to half a step so that zero is exact
    reach = (0.5 if scheme.symmetric else 1.0) * per_value(encoding.scale.abs(), scheme, x)
    error = (encoding.fake_quantize(x) - x).abs()
    assert (error <= reach * 1.00001 + 2**-22 * x.abs()).all()


@thorough
@given(cases(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_fake_quantize_is_dequantize_of_quantize_bit_for_bit(case, dtype):
    x, scheme = case
    encoding = measure(x, scheme)
    codes = encoding.quantize(x)
    assert codes.dtype == (torch.int32 if scheme.bitwidth > 8 else torch.uint8)
    assert codes.shape == x.shape
    once = encoding.fake_quantize(x)
    assert torch.equal(encoding.dequantize(codes), once)
    assert torch.equal(encoding.quantize(once), codes)
    assert torch.equal(encoding.fake_quantize(once), once)
    assert (encoding.fake_quantize(torch.zeros_like(x)) == 0).all()
    strided = x.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(encoding.quantize(strided), codes)
    assert torch.equal(encoding.fake_quantize(strided), once)
    # of any dtype; in place
    given = (1.5 * x).to(dtype)
    before, address = given.clone(), given.data_ptr()
    expected = encoding.fake_quantize(given)
    assert expected.dtype == dtype
    assert torch.equal(given, before), "the input stays as it is"
    assert encoding.fake_quantize_(given) is given
    assert given.data_ptr() == address
    assert torch.equal(given, expected)


@thorough
@given(cases(), st.sampled_from([0.01, 1.0, 3.0]))
def test_codes_are_in_range_and_follow_the_equation(case, stretch):
    x, scheme = case
    encoding = measure(x, scheme)
    scale, offset = per_value(encoding.scale, scheme, x), per_value(encoding.offset, scheme, x)
    codes = encoding.quantize(x * stretch)
    assert codes.min() >= 0
    assert codes.max() <= 2**scheme.bitwidth - 1
    columns = (tensor.flatten() for tensor in (x * stretch, codes, scale, offset))
    for value, code, s, o in zip(*columns, strict=True):  # Python rounds half to even too
        assert int(code) == min(max(round(float(value / s)) - int(o), 0), scheme.steps)


@brief
@given(matrices(), st.sampled_from([2, 3, 4, 8, 16]), st.booleans())
def test_a_block_that_is_the_row_or_the_tensor_equals_per_channel_or_tensor(x, bitwidth, symmetric):
    for granularity, values in ((PerChannel(0), x), (PerTensor(), x[:1])):
        whole = measure(values, Scheme(bitwidth, symmetric, granularity))
        block = measure(values, Scheme(bitwidth, symmetric, PerBlock(x.shape[1])))
        assert torch.equal(block.scale.flatten(), whole.scale.flatten())
        assert torch.equal(block.offset.flatten(), whole.offset.flatten())
        assert torch.equal(block.quantize(values), whole.quantize(values))
        assert torch.equal(block.fake_quantize(values), whole.fake_quantize(values))


@thorough
@given(cases(), st.sampled_from([0.5, 1.0, 1.5]))
def test_gradient_is_one_inside_and_zero_outside(case, stretch):
    x, scheme = case
    encoding = measure(x, scheme)
    scale, offset = per_value(encoding.scale, scheme, x), per_value(encoding.offset, scheme, x)
    leaf = (x * stretch).requires_grad_()
    steps = torch.round(leaf.detach() / scale)
    inside = (steps >= offset) & (steps <= offset + scheme.steps)
    values = encoding.fake_quantize(leaf)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    assert torch.equal(gradient, inside.float())
    plain = encoding.fake_quantize(leaf.detach())
    assert torch.equal(values.detach(), plain)
    assert plain.grad_fn is None


def test_gradient_stops_exactly_where_the_clamp_starts():
    encoding = Encoding(Scheme(2), torch.tensor(1.0), torch.tensor(-2, dtype=torch.int32))
    x = torch.tensor([-2.6, -2.5, -2.0, 0.3, 1.0, 1.49, 1.51], requires_grad=True)
    values = encoding.fake_quantize(x)
    values.backward(torch.arange(1.0, 8.0))
    assert values.tolist() == [-2, -2, -2, 0, 1, 1, 1]
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]
    with torch.no_grad():
        assert encoding.fake_quantize_(x) is x


def test_division_rounds_half_to_even_and_is_not_multiplication_by_the_reciprocal():
    encoding = Encoding(Scheme(4), torch.tensor(0.5), torch.tensor(-8, dtype=torch.int32))
    x = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75])
    assert encoding.quantize(x).tolist() == [8, 10, 10, 8, 6]
    scale = torch.tensor(0.0437)
    x = (torch.arange(-127, 127) + 0.5) * scale
    assert not torch.equal(torch.round(x / scale), torch.round(x * (1 / scale)))
    encoding = Encoding(Scheme(8), scale, torch.tensor(-128, dtype=torch.int32))
    assert torch.equal(encoding.quantize(x).int() - 128, torch.round(x / scale).int())


def test_infinity_gets_the_last_code_and_nan_stays_nan():
    encoding = measure(torch.tensor([-1.0, 1.0]), Scheme(4))
    assert encoding.quantize(torch.tensor([math.inf, -math.inf])).tolist() == [15, 0]
    assert encoding.fake_quantize(torch.tensor([math.nan])).isnan().all()  # visible in a simulation
    assert encoding.quantize(torch.empty(0, 3)).shape == (0, 3)
    assert encoding.fake_quantize(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("float_offset", [False, True])
@given(case=cases(range(2, 9)))
@brief
def test_narrow_values_get_the_codes_of_their_float32_values(case, float_offset, dtype):
    x, scheme = case
    if float_offset and not isinstance(scheme.granularity, SignedBlock):
        scheme = Scheme(scheme.bitwidth, False, scheme.granularity, float_offset=True)
    narrow = x.to(dtype)
    encoding = measure(narrow, scheme)
    assert encoding.equals(measure(narrow.float(), scheme))
    assert encoding.scale.dtype == torch.float32
    assert torch.equal(encoding.quantize(narrow), encoding.quantize(narrow.float()))
    values = encoding.fake_quantize(narrow)
    assert torch.equal(values, encoding.fake_quantize(narrow.float()).to(dtype))


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


@brief
@given(st.floats(0.0625, 1e6), st.floats(0.0625, 1e6))
def test_a_range_on_one_side_of_zero_still_holds_zero(near, width):
    low, high = torch.tensor(near), torch.tensor(near + width)
    above = encoding_from_range(low, high, Scheme(8, symmetric=False))
    assert int(above.offset) == 0
    below = encoding_from_range(-high, -low, Scheme(8, symmetric=False))
    assert int(below.offset) == -255
    assert torch.equal(above.scale, below.scale)


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


ONE, FLAT, ROWS = torch.ones(1), torch.ones(2, 4), torch.ones(2, 1)
INTEGERS = torch.zeros(2, 1, dtype=torch.int32)
PLAIN, SIGNED = (Scheme(4, granularity=kind(4)) for kind in (PerBlock, SignedBlock))
MINIMUM = Scheme(4, False, PerBlock(4), float_offset=True)
NOT_FINITE = (math.inf, -math.inf, math.nan)


def tensor_grid(scale, offset=0, symmetric=True):
    """An encoding per tensor of four bits."""
    return Encoding(Scheme(4, symmetric), torch.tensor(scale), torch.tensor(offset).int())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        # scales and offsets
        (lambda: tensor_grid([1.0, 1.0]), r"scale has shape \[2\] but offset \[\]"),
        (lambda: Encoding(MINIMUM, ONE, FLAT[0]), r"scale has shape \[1\] but minimum \[4\]"),
        *(
            (
                lambda bad=bad: tensor_grid([1.0, bad], [0, 0]),
                rf"finite positive .* 1 of 2 are not, {bad} the first",
            )
            for bad in (0.0, -1.0, math.nan, math.inf)
        ),
        (lambda: Encoding(PLAIN, -ROWS, INTEGERS - 8), "a scale is a finite positive number"),
        (lambda: Encoding(SIGNED, 0 * ROWS, INTEGERS - 8), "a finite number other than 0"),
        *(
            (lambda bad=bad: tensor_grid(1.0, bad, False), r"an offset is outside \[-15, 0\]")
            for bad in (1, -16)
        ),
        (lambda: Encoding(MINIMUM, ROWS, INTEGERS), "minimum has another type"),
        (lambda: Encoding(PLAIN, ROWS, 0 * ROWS), "offset has another type"),
        (lambda: Encoding(MINIMUM, ONE, ONE * math.inf), "a minimum is not finite"),
        (lambda: measure(FLAT, MINIMUM).offset, "a float minimum, which has no integer offset"),
        # values
        *(
            (lambda act=act: act(measure(FLAT, PLAIN), torch.zeros(3, 4)), "needs scales of shape")
            for act in (Encoding.quantize, Encoding.fake_quantize)
        ),
        (lambda: Encoding(MINIMUM, ONE, ONE).quantize(FLAT[0] * math.nan), "4 of 4 values are nan"),
        (
            lambda: tensor_grid(1.0, -8).quantize(torch.tensor([math.nan, 0])),
            "1 of 2 values are nan",
        ),
        *(
            (lambda x=x: tensor_grid(1.0, -8).fake_quantize_(x), "expanded or need a gradient")
            for x in (torch.ones(4, requires_grad=True), torch.randn(4, 1).expand(4, 4))
        ),
        # ranges
        *(
            (
                lambda bad=bad, kind=kind: measure(
                    torch.tensor([[1.0, bad]]), Scheme(8, True, kind)
                ),
                "observed range is not finite",
            )
            for kind in EVERY
            for bad in NOT_FINITE
        ),
        (lambda: measure(torch.tensor([-3e38, 3e38]), Scheme(8)), "wider than float32 can hold"),
        (lambda: measure(torch.empty(0, 4), Scheme(8)), r"shape \[0, 4\] holds no values"),
        (lambda: measure(FLAT, Scheme(8, True, PerBlock(3))), "blocks of 3 do not divide the last"),
    ],
)
def test_impossible_grids_and_values_are_refused(act, message, monkeypatch):
    # as in a user's process, where signatures are not checked
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises((CalibrationError, GridError), match=message):
        act()
