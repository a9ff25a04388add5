from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwlora.errors import GridError
from qwlora.grid.encoding import Encoding
from qwlora.grid.lpbq import split_scales, to_integer_scales
from qwlora.grid.min_max import measure
from qwlora.grid.scheme import Lpbq, PerBlock, Scheme, parse_scheme

from .strategies import brief, matrices

SCHEME = Scheme(4, granularity=Lpbq(2))


@brief
@given(matrices(columns=8), st.integers(1, 8), st.sampled_from([2, 3, 4, 8]))
def test_scales_are_integers_times_the_rows_scale(x, scale_bitwidth, bitwidth):
    scheme = Scheme(bitwidth, granularity=Lpbq(2, scale_bitwidth))
    encoding = measure(x, scheme)
    row, integers = split_scales(encoding.scale, scheme)
    assert row.shape == x.shape[:1]
    assert integers.shape == (x.shape[0], 4)
    assert integers.min() >= 1
    assert (integers.max(-1).values == 2**scale_bitwidth).all(), (
        "the largest block must use the whole integer range"
    )
    assert torch.equal(integers * row.unsqueeze(-1), encoding.scale)


@brief
@given(matrices(columns=8))
def test_scales_are_the_nearest_such_products(x):
    plain, low_power = (
        measure(x, Scheme(4, granularity=PerBlock(2))).scale,
        measure(x, SCHEME).scale,
    )
    row = plain.amax(-1, keepdim=True) / 16
    assert torch.equal(low_power.amax(-1), plain.amax(-1))
    assert ((low_power - plain).abs() <= torch.where(plain < row / 2, row, row / 2) * 1.00001).all()


def test_finding_integer_scales_twice_is_once():
    scale = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) + 0.01
    once = to_integer_scales(scale, SCHEME)
    assert torch.equal(to_integer_scales(once, SCHEME), once)


def test_by_hand():
    scale = to_integer_scales(torch.tensor([[16.0, 8.4, 0.1], [0.5, 1.0, 2.0]]), SCHEME)
    assert scale.tolist() == [[16, 8, 1], [0.5, 1, 2]]
    row, integers = split_scales(scale, SCHEME)
    assert row.tolist() == [1, 0.125]
    assert integers.tolist() == [[16, 8, 1], [4, 8, 16]]


def test_it_is_a_block_to_whoever_knows_only_blocks():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    low_power = measure(x, Scheme(4, granularity=Lpbq(32)))
    plain = Encoding(Scheme(4, granularity=PerBlock(32)), low_power.scale, low_power.offset)
    assert torch.equal(plain.fake_quantize(x), low_power.fake_quantize(x))
    assert Lpbq(32) != PerBlock(32)


def test_other_scales_are_refused():
    with pytest.raises(
        GridError,
        match="1 of 2 block scales are not an integer times their row's scale; pass them through to_integer_scales",
    ):
        split_scales(torch.tensor([[1.0, 0.3]]), SCHEME)
    with pytest.raises(
        GridError,
        match=r"int4 symmetric per block 2: only blocks with integer scales \(Lpbq\) have them",
    ):
        to_integer_scales(torch.ones(1, 2), Scheme(4, granularity=PerBlock(2)))


def test_impossible_schemes_are_refused():
    with pytest.raises(
        GridError,
        match=r"blocks with integer scales \(LPBQ\) are symmetric; say symmetric=True, or use PerBlock",
    ):
        Scheme(4, False, Lpbq(32))
    for bits in (0, 9):
        with pytest.raises(GridError, match=f"a block's integer scale has 1 to 8 bits, not {bits}"):
            Lpbq(32, bits)
    with pytest.raises(GridError, match="a block holds at least one value, not 0"):
        Lpbq(0)


def test_names_and_json():
    scheme = parse_scheme("w4-lpbq64")
    assert scheme == Scheme(4, granularity=Lpbq(64))
    assert str(scheme) == "int4 symmetric per block 64 with int4 scales"
    assert scheme.to_json() == {
        "bitwidth": 4,
        "symmetric": True,
        "axis": None,
        "block_size": 64,
        "scale_bitwidth": 4,
    }
    assert Scheme.from_json(scheme.to_json()) == scheme
