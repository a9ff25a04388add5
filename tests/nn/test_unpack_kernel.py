"""The Triton kernel, run on the CPU by Triton's interpreter, gives the bits of torch's operations."""

import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import nn

from formats.packing import quantized
from qwlora.grid.encoding import Encoding, QuantizedTensor, measure
from qwlora.grid.scheme import Blocks, Lpbq, PerBlock, PerChannel, PerTensor, Scheme, SignedBlock
from qwlora.nn import pack_module, packed_tensor
from qwlora.nn.packed_tensor import PackedTensor

pytest.importorskip("triton", reason="Triton has no wheel for this machine")
NAME = "qwlora.nn.unpack_kernel"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = [
    *(Scheme(bits, granularity=PerBlock(16)) for bits in range(2, 9)),
    *(Scheme(bits, False, PerBlock(16)) for bits in range(2, 9)),
    *(Scheme(bits, granularity=Lpbq(16, more)) for bits, more in ((4, 4), (2, 3), (3, 8))),
    *(Scheme(bits, granularity=SignedBlock(16)) for bits in (2, 5)),
    *(
        Scheme(bits, symmetric, kind)
        for bits, symmetric in ((4, True), (3, False), (8, False))
        for kind in (PerTensor(), PerChannel(0), PerChannel(1))
    ),
    *(Scheme(4, False, kind, True) for kind in (PerTensor(), PerChannel(0), PerBlock(16))),
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of each weight that the kernel unpacks from now on, on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the module is imported
    spec: Any = importlib.util.find_spec(NAME)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launched, unpack_rows = list[torch.dtype](), module.unpack_rows

    def counted(*arguments: Any) -> torch.Tensor:
        launched.append(arguments[-1])
        return unpack_rows(*arguments)

    monkeypatch.setattr(module, "unpack_rows", counted)
    monkeypatch.setitem(sys.modules, NAME, module)
    monkeypatch.setattr(packed_tensor, "has_kernel", lambda device: True)
    return launched


def example(scheme: Scheme, shape: tuple[int, ...], stored: torch.dtype) -> PackedTensor:
    """A tensor whose scales, and float minima, are stored in a dtype."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = measure(x, scheme)
    low_end = found.low_end.to(stored).float() if scheme.float_offset else found.low_end
    scale = found.scale.to(stored).float()
    encoding = Encoding(scheme, scheme.nearest(scale), low_end)
    return PackedTensor.from_quantized(QuantizedTensor(encoding.quantize(x), encoding))


def by_torch(packed: PackedTensor, dtype: torch.dtype, index: Any = None) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_tensor, "has_kernel", lambda device: False)
        return packed.dequantize(dtype, index)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_values_have_the_bits_of_torchs_operations(scheme: Scheme, launches: Any) -> None:
    # a row that fills no whole bytes where the grid allows one
    count = 48 if isinstance(scheme.granularity, Blocks) else 13
    for dtype, stored in zip(DTYPES, (torch.float16, torch.bfloat16, torch.float32), strict=True):
        packed = example(scheme, (3, count), stored)
        values = packed.dequantize(dtype)
        assert values.dtype == dtype
        assert torch.equal(values, by_torch(packed, dtype))
    assert launches == [*DTYPES]


@pytest.mark.parametrize("kind", [PerTensor(), PerChannel(0), PerChannel(2), PerBlock(8), Lpbq(8)])
def test_experts_and_rows_are_unpacked_alone(kind: Any, launches: Any) -> None:
    packed = example(Scheme(3, isinstance(kind, Lpbq), kind), (4, 2, 24), torch.float32)
    for index in (
        None,
        2,
        slice(1, 3),
        torch.tensor([[3, 0], [0, 1]]),
        torch.tensor([], dtype=int),
    ):
        values = packed.dequantize(torch.float32, index)
        assert torch.equal(values, by_torch(packed, torch.float32, index))
    assert len(launches) == 5


def test_long_rows_take_several_programs(launches: Any) -> None:
    packed = example(Scheme(7, False, PerBlock(20)), (2, 1100), torch.float16)
    assert torch.equal(packed.dequantize(torch.bfloat16), by_torch(packed, torch.bfloat16))
    assert len(launches) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_and_backward_each_unpack_once(compiled: bool, launches: Any) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(32, 8)
    layer = pack_module(plain, quantized(plain.weight, "w4-block16-asymmetric"))
    x = torch.randn(3, 32, requires_grad=True)
    call: Any = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    y = call(x)
    assert launches == [torch.float32]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert launches == [torch.float32] * 2
    if compiled:
        assert torch._dynamo.explain(layer)(x).graph_break_count == 0
    weight = by_torch(layer.tensor, torch.float32)
    assert torch.equal(y, nn.functional.linear(x, weight, layer.bias))
    assert torch.equal(gradient, torch.ones(3, 8) @ weight)


def test_torch_unpacks_where_triton_is_missing_or_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    has_kernel, cuda = packed_tensor.has_kernel.__wrapped__, torch.device("cuda")
    for capability, can in (((9, 0), True), ((7, 5), True), ((6, 1), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert has_kernel(cuda) is can
    assert not has_kernel(torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not has_kernel(cuda)
