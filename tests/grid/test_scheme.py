import re

import pytest

from qwlora.errors import GridError
from qwlora.grid.scheme import (
    Lpbq,
    PerBlock,
    PerChannel,
    PerTensor,
    Scheme,
    parse_scheme,
    short_name,
)


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
        (
            Scheme(4, False, PerBlock(32), float_offset=True),
            None,
            "int4 float-offset per block 32",
            {"float_offset": True},
        ),
        (Scheme(8, granularity=PerChannel(1)), None, "int8 symmetric per channel", {"axis": 1}),
        (Scheme(2, granularity=PerChannel(-4)), None, "int2 symmetric per channel", {"axis": -4}),
        (Scheme(16, False), "w16-tensor-asymmetric", "int16 asymmetric per tensor", {}),
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
        (PerChannel(2), (4, 4), r"channel axis 2 is outside of shape \[4, 4\]"),
        (PerChannel(-3), (4, 4), r"channel axis -3 is outside"),
        (PerBlock(3), (4, 4), r"blocks of 3 do not divide the last axis of .* shape \[4, 4\]"),
        (PerBlock(1), (), r"blocks of 1 do not divide the last axis of a tensor of shape \[\]"),
    ],
)
def test_scales_of_a_shape_or_why_there_are_none(granularity, shape, expected):
    scheme = Scheme(4, granularity=granularity)
    if isinstance(expected, tuple):
        assert scheme.scale_shape(shape) == expected
    else:
        with pytest.raises(GridError, match=expected):
            scheme.scale_shape(shape)


SHORT = ["", "w4", "int4-channel", "w4-block", "w4-block32-symmetric", "w4-channel ", "W4-channel"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((lambda text=text: parse_scheme(text), "is not understood") for text in SHORT),
        *((lambda n=n: Scheme(n), f"bitwidth {n} is not one of 2 to 16") for n in (0, 1, 17, -4)),
        (lambda: parse_scheme("w17-channel"), "is not one of 2 to 16"),
    ],
)
def test_what_is_no_scheme_is_refused(make, message):
    with pytest.raises(GridError, match=message):
        make()
