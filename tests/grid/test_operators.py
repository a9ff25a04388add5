from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qwlora.grid.observer import measure
from qwlora.grid.operators import dequantize, quantized
from qwlora.grid.packing import pack

from .strategies import brief, matrices, schemes_for


@brief
@given(st.data())
def test_dequantize_is_the_encodings_own_bit_for_bit(data):
    x = data.draw(matrices())
    scheme = data.draw(schemes_for(tuple(x.shape), bitwidths=(2, 3, 4, 5, 6, 7, 8)))
    encoding = measure(x, scheme)
    codes = encoding.quantize(x)
    layout = scheme.to_json()
    offset = None if scheme.symmetric else encoding.offset
    values = dequantize(pack(codes, scheme.bitwidth), encoding.scale, offset, x.shape[-1], scheme.bitwidth, layout["axis"], layout["block_size"])
    assert torch.equal(values, encoding.dequantize(codes))


def test_operators_survive_torchs_own_checks():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(quantized, (x, "x"), test_utils=tests)
    packed = pack(torch.randint(0, 8, (4, 8), dtype=torch.uint8), 3)
    torch.library.opcheck(dequantize, (packed, torch.rand(4, 2) + 0.1, None, 8, 3, None, 4), test_utils=tests)


def test_quantized_marks_and_changes_nothing():
    x = torch.randn(3)
    assert torch.equal(quantized(x, "name"), x)
