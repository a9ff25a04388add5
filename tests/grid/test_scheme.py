import re
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


FLOAT_OFFSET = Scheme(4, False, PerBlock(32), float_offset=True)


@pytest.mark.parametrize(
    ("scheme", "name", "text", "record"),
    [
        (Scheme(8), "w8-tensor", "int8 symmetric per tensor", {}),
        (Scheme(8, False), "w8-tensor-asymmetric", "int8 asymmetric per tensor", {}),
        (Scheme(8, True, PerChannel(0)), "w8-channel", "int8 symmetric per channel", {"axis": 0}),
        (
            Scheme(3, False, PerBlock(64)),
            "w3-block64-asymmetric",
            "int3 asymmetric per block 64",
            {},
        ),
        (
            Scheme(4, granularity=Lpbq(64)),
            "w4-lpbq64",
            "int4 symmetric per block 64 with int4 scales",
            {"scale_bitwidth": 4},
        ),
        # without a short name
        (
            Scheme(4, True, Lpbq(32, 6)),
            None,
            "int4 symmetric per block 32 with int6 scales",
            {"scale_bitwidth": 6},
        ),
        (FLOAT_OFFSET, None, "int4 float-offset per block 32", {"float_offset": True}),
        (Scheme(8, granularity=PerChannel(1)), None, "int8 symmetric per channel", {"axis": 1}),
    ],
)
def test_texts_of_a_scheme(scheme, name, text, record):
    assert str(scheme) == text
    assert short_name(scheme) == (name or text)
    assert name is None or parse_scheme(name) == scheme
    plain = {"bitwidth": scheme.bitwidth, "symmetric": scheme.symmetric}
    sizes = [int(size) for size in re.findall(r"block (\d+)", text)]
    block_size = sizes[0] if sizes else None
    assert scheme.to_json() == {**plain, "axis": None, "block_size": block_size, **record}


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
        (PerChannel(2), (4, 4), r"channel axis 2 is outside of shape \[4, 4\]"),
        (PerChannel(-3), (4, 4), r"channel axis -3 is outside"),
        (PerBlock(3), (4, 4), r"blocks of 3 do not divide the last axis of .* shape \[4, 4\]"),
        (PerBlock(1), (), r"blocks of 1 do not divide the last axis of a tensor of shape \[\]"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(granularity, shape, message):
    with pytest.raises(GridError, match=message):
        Scheme(4, granularity=granularity).scale_shape(shape)


@pytest.mark.parametrize("bitwidth", [0, 1, 17, 32, -4])
def test_other_bitwidths_are_refused(bitwidth):
    with pytest.raises(GridError, match=f"bitwidth {bitwidth} is not one of 2 to 16"):
        Scheme(bitwidth)
    with pytest.raises(GridError, match=r"is not one of 2 to 16|is not understood"):
        parse_scheme(f"w{bitwidth}-channel")


@pytest.mark.parametrize(
    "text",
    ["", "w4", "int4-channel", "w4-block", "w4-block32-symmetric", "w4-channel ", "W4-channel"],
)
def test_a_short_name_that_is_not_one_is_refused(text):
    with pytest.raises(GridError, match="is not understood; write it like w4-block32"):
        parse_scheme(text)


def test_schemes_do_not_need_torch():
    script = "import sys, qwlora.grid.scheme; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
