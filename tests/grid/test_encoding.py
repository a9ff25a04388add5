import math

import jaxtyping
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from qwlora.errors import GridError
from qwlora.grid.encoding import Encoding, aligned, grouped, measure
from qwlora.grid.scheme import (
    BITWIDTHS,
    Blocks,
    PerBlock,
    PerChannel,
    PerTensor,
    Scheme,
    SignedBlock,
)

from .strategies import brief, cases, matrices, schemes_for, thorough


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


@thorough
@given(st.data())
def test_fake_quantize_is_monotone(data):
    x = data.draw(matrices())
    scheme = data.draw(schemes_for(tuple(x.shape)))
    encoding = measure(x, scheme)
    step = data.draw(st.floats(0, 1e3))
    assert (encoding.fake_quantize(x + step) >= encoding.fake_quantize(x)).all()


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
    for shared in (x, torch.randn(4, 1).expand(4, 4)):  # others still need it
        with pytest.raises(GridError, match="must not be expanded or need a gradient"):
            encoding.fake_quantize_(shared)
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


def test_infinity_gets_the_last_code_and_nan_is_refused():
    encoding = measure(torch.tensor([-1.0, 1.0]), Scheme(4))
    assert encoding.quantize(torch.tensor([math.inf, -math.inf])).tolist() == [15, 0]
    assert encoding.fake_quantize(torch.tensor([math.nan])).isnan().all()  # visible in a simulation
    with pytest.raises(GridError, match="1 of 2 values are nan, which has no code"):
        encoding.quantize(torch.tensor([math.nan, 0.0]))
    assert encoding.quantize(torch.empty(0, 3)).shape == (0, 3)
    assert encoding.fake_quantize(torch.empty(0, 3)).shape == (0, 3)


@brief
@given(cases())
def test_a_tensor_of_another_shape_is_refused(case):
    x, scheme = case
    assume(not isinstance(scheme.granularity, PerTensor))
    encoding, other = measure(x, scheme), torch.zeros([n + 1 for n in x.shape])
    if isinstance(scheme.granularity, Blocks):
        other = torch.zeros(5, 5, 7, 2 * x.shape[-1])
    for act in (encoding.fake_quantize, encoding.quantize):
        with pytest.raises(GridError, match="needs scales of shape"):
            act(other)


def test_impossible_encodings_are_refused(monkeypatch):
    zero = torch.tensor(0, dtype=torch.int32)
    # as in a user's process, where signatures are not checked
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(GridError, match=r"scale has shape \[2\] but offset \[\]"):
        Encoding(Scheme(4), torch.ones(2), zero)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(GridError, match=rf"finite positive .* 1 of 2 are not, {bad} the first"):
            Encoding(Scheme(4), torch.tensor([1.0, bad]), zero.expand(2))
    for bad in (1, -16):
        with pytest.raises(GridError, match=r"an offset is outside \[-15, 0\]"):
            Encoding(Scheme(4, False), torch.tensor(1.0), torch.tensor(bad, dtype=torch.int32))


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
