from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwlora.errors import GridError
from qwlora.grid.scheme import (
    BITWIDTHS,
    Lpbq,
    PerBlock,
    PerChannel,
    PerTensor,
    Scheme,
    parse_scheme,
    short_name,
)

from .strategies import brief

granularities = st.one_of(
    st.just(PerTensor()),
    st.builds(PerChannel, st.integers(-4, 3)),
    st.builds(PerBlock, st.integers(1, 256)),
)
schemes = st.one_of(
    st.builds(Scheme, st.sampled_from(BITWIDTHS), st.booleans(), granularities),
    st.builds(Scheme, st.just(4), st.just(False), granularities, st.booleans()),
    st.builds(Scheme, st.just(4), st.just(True), st.builds(Lpbq, st.just(32), st.integers(1, 8))),
)


@brief
@given(schemes)
def test_json_round_trip(scheme):
    assert Scheme.from_json(scheme.to_json()) == scheme


@pytest.mark.parametrize(
    ("granularity", "shape", "expected"),
    [
        (PerTensor(), (64, 32), ()),
        (PerTensor(), (), ()),
        (PerChannel(0), (64, 32), (64,)),
        (PerChannel(-1), (2, 3, 5), (5,)),
        (PerBlock(8), (64, 32), (64, 4)),
        (PerBlock(32), (32,), (1,)),
    ],
)
def test_scale_shape(granularity, shape, expected):
    assert Scheme(4, granularity=granularity).scale_shape(shape) == expected


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (PerChannel(2), (4, 4), r"channel axis 2 is outside a tensor of shape \[4, 4\]"),
        (PerChannel(-3), (4, 4), r"channel axis -3 is outside"),
        (
            PerBlock(3),
            (4, 4),
            r"blocks of 3 do not divide the last axis of a tensor of shape \[4, 4\]",
        ),
        (PerBlock(1), (), r"blocks of 1 do not divide the last axis of a tensor of shape \[\]"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(granularity, shape, message):
    with pytest.raises(GridError, match=message):
        Scheme(4, granularity=granularity).scale_shape(shape)


@pytest.mark.parametrize("bitwidth", BITWIDTHS)
def test_steps_and_symmetric_offset(bitwidth):
    scheme = Scheme(bitwidth)
    assert scheme.steps == 2**bitwidth - 1
    assert scheme.symmetric_offset == -(2**bitwidth) // 2


@pytest.mark.parametrize("bitwidth", [0, 1, 17, 32, -4])
def test_other_bitwidths_are_refused(bitwidth):
    with pytest.raises(GridError, match=f"bitwidth {bitwidth} is not one of 2 to 16"):
        Scheme(bitwidth)


def test_an_empty_block_is_refused():
    with pytest.raises(GridError, match="a block holds at least one value, not 0"):
        PerBlock(0)


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("w4-block32", Scheme(4, granularity=PerBlock(32))),
        ("w8-channel", Scheme(8, granularity=PerChannel(0))),
        ("w8-tensor", Scheme(8)),
        ("w3-block64-asymmetric", Scheme(3, False, PerBlock(64))),
    ],
)
def test_short_names(text, scheme):
    assert parse_scheme(text) == scheme


@pytest.mark.parametrize(
    "text",
    ["", "w4", "int4-channel", "w4-block", "w4-block32-symmetric", "w4-channel ", "W4-channel"],
)
def test_a_short_name_that_is_not_one_is_refused(text):
    with pytest.raises(GridError, match="is not understood; write it like w4-block32"):
        parse_scheme(text)


def test_a_short_name_with_an_impossible_bitwidth_is_refused():
    with pytest.raises(GridError, match="bitwidth 17 is not one of"):
        parse_scheme("w17-channel")


def test_schemes_read_well():
    assert str(Scheme(4, granularity=PerBlock(32))) == "int4 symmetric per block 32"
    assert str(Scheme(8, False)) == "int8 asymmetric per tensor"
    assert str(Scheme(8, granularity=PerChannel(0))) == "int8 symmetric per channel"


def test_schemes_do_not_need_torch():
    script = "import sys, qwlora.grid.scheme; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    "name",
    ["w4-block32", "w3-block64-asymmetric", "w8-channel", "w2-tensor-asymmetric", "w4-lpbq64"],
)
def test_a_short_name_is_read_back(name: str) -> None:
    assert short_name(parse_scheme(name)) == name


def test_a_scheme_without_a_short_name_is_described() -> None:
    assert (
        short_name(Scheme(4, True, Lpbq(32, 6))) == "int4 symmetric per block 32 with int6 scales"
    )
    assert "float-offset" in short_name(Scheme(4, False, PerBlock(32), float_offset=True))
