import re

import pytest
import torch

from qwlora.errors import GridError
from qwlora.grid.scheme import (
    Lpbq,
    PerBlock,
    PerChannel,
    PerTensor,
    Scheme,
    SignedBlock,
    parse_scheme,
    short_name,
)

ASYMMETRIC = Scheme(3, False, PerBlock(64))
SIGNED = Scheme(4, True, SignedBlock(32))
LOW_POWER, SIX_BITS = Scheme(4, True, Lpbq(64)), Scheme(4, True, Lpbq(32, 6))
FLOAT_OFFSET = Scheme(4, False, PerBlock(32), float_offset=True)
BLOCK = "int4 symmetric per block"


@pytest.mark.parametrize(
    ("scheme", "name", "text", "record"),
    [
        (Scheme(8), "w8-tensor", "int8 symmetric per tensor", {}),
        (Scheme(8, False), "w8-tensor-asymmetric", "int8 asymmetric per tensor", {}),
        (Scheme(8, True, PerChannel(0)), "w8-channel", "int8 symmetric per channel", {"axis": 0}),
        (ASYMMETRIC, "w3-block64-asymmetric", "int3 asymmetric per block 64", {}),
        (SIGNED, "w4-signed32", "int4 symmetric per signed block 32", {"kind": "signed"}),
        (LOW_POWER, "w4-lpbq64", f"{BLOCK} 64 with int4 scales", {"scale_bitwidth": 4}),
        # without a short name
        (SIX_BITS, None, f"{BLOCK} 32 with int6 scales", {"scale_bitwidth": 6}),
        (FLOAT_OFFSET, None, "int4 float-offset per block 32", {"float_offset": True}),
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
    size = re.search(r"block (\d+)", text)
    block_size = int(size[1]) if size else None
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
        (lambda: Scheme(4, False, SignedBlock(32)), "signed grids .*; remove -asymmetric"),
        (lambda: Scheme(4, False, Lpbq(32)), "remove -asymmetric"),
        (lambda: Scheme(4, float_offset=True), "a symmetric grid has no float offset"),
        (lambda: Lpbq(2).split(torch.tensor([[1.0, 0.3]])), "1 of 2 block scales"),
        *((lambda n=n: Lpbq(32, n), f"1 to 8 bits, not {n}") for n in (0, 9)),
        (lambda: Lpbq(0), "at least one value, not 0"),
    ],
)
def test_what_is_no_scheme_is_refused(make, message):
    with pytest.raises(GridError, match=message):
        make()
