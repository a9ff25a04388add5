import torch
from hypothesis import given
from hypothesis import strategies as st

from grid.strategies import brief, matrices, schemes_for
from qwlora.grid.encoding import QuantizedTensor, measure
from qwlora.grid.scheme import PerBlock, Scheme
from qwlora.nn.custom_ops import dequantize, gather, linear, quantized
from qwlora.nn.packed_tensor import PackedTensor


def arguments(packed: PackedTensor) -> tuple:
    return *packed.parts, packed.count, packed.scheme.to_text()


def example(scheme: Scheme) -> PackedTensor:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    encoding = measure(x, scheme)
    return PackedTensor.from_quantized(QuantizedTensor(encoding.quantize(x), encoding))


@brief
@given(st.data())
def test_dequantize_is_the_encodings_own_bit_for_bit(data):
    x = data.draw(matrices())
    scheme = data.draw(schemes_for(tuple(x.shape), bitwidths=(2, 3, 4, 5, 6, 7, 8)))
    encoding = measure(x, scheme)
    codes = encoding.quantize(x)
    values = dequantize(*arguments(PackedTensor.from_quantized(QuantizedTensor(codes, encoding))))
    assert torch.equal(values, encoding.dequantize(codes))


def test_operators_survive_torchs_own_checks():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for scheme in (Scheme(3, granularity=PerBlock(4)), Scheme(2, False, PerBlock(4)), Scheme(8)):
        parts = arguments(example(scheme))
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(quantized, (x, "x"), test_utils=tests)
        torch.library.opcheck(dequantize, parts, test_utils=tests)
        torch.library.opcheck(gather, (torch.tensor([[2, 0], [1, 1]]), *parts), test_utils=tests)
        torch.library.opcheck(linear, (x.clone().requires_grad_(), *parts))
