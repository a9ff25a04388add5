from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grid.strategies import cases, thorough
from qwlora.errors import GridError
from qwlora.grid.encoding import Encoding, QuantizedTensor, measure
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, PerTensor, Scheme
from qwlora.nn import custom_ops
from qwlora.nn.packed_tensor import PackedTensor, narrowest

NARROW = (2, 3, 4, 5, 6, 7, 8)


def quantized(x, scheme):
    encoding = measure(x, scheme)
    return QuantizedTensor(encoding.quantize(x), encoding)


@st.composite
def tensors(draw):
    """Any grid with integer offsets; or with float offsets, or with integer scales, where they can be had."""
    x, scheme = draw(cases(bitwidths=NARROW))
    kind = draw(st.sampled_from(["plain", "float", "low power"]))
    if kind == "float" and not scheme.symmetric:
        scheme = replace(scheme, float_offset=True)
    if kind == "low power" and isinstance(scheme.granularity, PerBlock):
        blocks = Lpbq(scheme.granularity.size, draw(st.integers(1, 8)))
        scheme = Scheme(scheme.bitwidth, granularity=blocks)
    return quantized(x, scheme)


@thorough
@given(tensors(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_packing_loses_nothing_and_values_are_the_float32_product_rounded_once(original, dtype):
    packed = PackedTensor.from_quantized(original)
    assert packed.shape == tuple(original.codes.shape)
    again, scheme = packed.quantized, original.encoding.scheme
    assert torch.equal(again.codes, original.codes)
    assert again.encoding.scheme == scheme
    assert torch.equal(again.encoding.scale, original.encoding.scale)
    assert again.encoding.scale.dtype == torch.float32
    low = "minimum" if scheme.float_offset else "offset"
    assert torch.equal(getattr(again.encoding, low), getattr(original.encoding, low))
    values = packed.dequantize(dtype)
    assert values.dtype == dtype
    assert torch.equal(values, original.dequantize().to(dtype))
    arguments = (*packed.parts, packed.count, packed.scheme.to_text())
    assert torch.equal(custom_ops.dequantize(*arguments), original.dequantize())
    empty = PackedTensor.empty(packed.scheme, packed.shape)
    for a, b in zip(packed.parts, empty.parts, strict=True):
        assert (a is None) == (b is None)
        assert a is None or a.shape == b.shape
        assert a is None or a.dtype.is_floating_point == b.dtype.is_floating_point


# torch 2.15's own check reads the gradient of a tensor that is not a leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("granularity", [PerBlock(4), PerTensor()])
def test_operators_survive_torchs_own_checks(granularity):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    packed = PackedTensor.from_quantized(quantized(x, Scheme(3, False, granularity)))
    parts = (*packed.parts, packed.count, packed.scheme.to_text())
    calls = {
        custom_ops.quantized: (x, "x"),
        custom_ops.dequantize: parts,
        custom_ops.gather: (torch.tensor([[2, 0], [1, 1]]), *parts),
        custom_ops.linear: (x.clone().requires_grad_(), *parts),
    }
    for operator, arguments in calls.items():
        tests = (
            {}
            if operator is custom_ops.linear
            else {"test_utils": ("test_schema", "test_faketensor")}
        )
        torch.library.opcheck(operator, arguments, **tests)


@thorough
@given(tensors(), st.data())
def test_rows_are_those_of_the_whole(original, data):
    packed, values = PackedTensor.from_quantized(original), original.dequantize()
    rows = st.integers(0, values.shape[0] - 1)
    if values.ndim > 1:
        pairs = st.lists(st.tuples(rows, rows), min_size=1, max_size=3)
        index = torch.tensor(data.draw(pairs))
        assert torch.equal(packed.dequantize(index=index), values[index])
        assert torch.equal(packed.dequantize(index=index[0, 0]), values[index[0, 0]])


@pytest.mark.parametrize("chunk", [1, 100, 2**18])
def test_work_in_chunks_gives_the_same(monkeypatch, chunk):
    monkeypatch.setattr("qwlora.nn.packed_tensor._AT_ONCE", chunk)
    for scheme in (
        Scheme(3, False, PerBlock(8)),
        Scheme(4, False, PerChannel(0)),
        Scheme(4, False, PerChannel(1)),
        Scheme(4, granularity=PerChannel(2)),
    ):
        weight = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
        original = quantized(weight, scheme)
        packed, values = PackedTensor.from_quantized(original), original.dequantize()
        assert torch.equal(packed.dequantize(), values)
        assert torch.equal(packed.dequantize(index=torch.tensor([2, 0])), values[[2, 0]])


@pytest.mark.parametrize("bitwidth", NARROW)
def test_numbers_are_stored_as_narrow_as_they_allow(bitwidth):
    assert narrowest(torch.tensor([0.5, 2.0**-24])).dtype == torch.float16
    assert narrowest(torch.tensor([1e30]).bfloat16().float()).dtype == torch.bfloat16
    assert narrowest(torch.tensor([0.1])).dtype == torch.float32
    assert narrowest(torch.tensor([65536.0, 1 + 2**-10])).dtype == torch.float32
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    measured = measure(x, Scheme(bitwidth, bitwidth > 2, PerBlock(32)))
    encoding = Encoding(measured.scheme, measured.scale.half().float(), measured.offset)
    packed = PackedTensor.from_quantized(QuantizedTensor(encoding.quantize(x), encoding))
    assert packed.parts.scale.dtype == torch.float16
    assert 8 * packed.nbytes / x.numel() <= bitwidth + 0.6


def test_what_cannot_be_packed_is_refused():
    codes, scales = torch.zeros(1, 4, dtype=torch.uint8), torch.tensor([[0.1, 0.0333]])
    wide = QuantizedTensor(codes, measure(torch.randn(1, 4), Scheme(16)))
    with pytest.raises(GridError, match="codes of 16 bits are not packed"):
        PackedTensor.from_quantized(wide)
    offset = torch.full((1, 2), -8, dtype=torch.int32)
    loose = QuantizedTensor(codes, Encoding(Scheme(4, True, Lpbq(2)), scales, offset))
    with pytest.raises(GridError, match="1 of 2 block scales are not an integer times their row's"):
        PackedTensor.from_quantized(loose)
