"""What torch.compile makes of unpacking, on the CPU, has the bits of torch's own operations."""

from collections.abc import Iterator
from functools import partial
from itertools import cycle
from typing import Any

import jaxtyping
import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from formats.packing import quantized
from qwlora.errors import QwloraWarning
from qwlora.grid.encoding import Encoding, QuantizedTensor, measure
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, PerTensor, Scheme, SignedBlock
from qwlora.nn import pack_module, packed_tensor
from qwlora.nn.packed_tensor import PackedTensor

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
]


def example(scheme: Scheme, *shape: int) -> PackedTensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    encoding = measure(x, scheme)
    encoding = Encoding(scheme, scheme.granularity.nearest(encoding.scale), encoding.low_end)
    return PackedTensor.from_quantized(QuantizedTensor(encoding.quantize(x), encoding))


@pytest.fixture(autouse=True)
def no_type_checks() -> Iterator[None]:
    """Compile what users compile: annotations are checked in tests only."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Unpacking(nn.Module):
    """Unpacks tensors of many schemes in one graph, which compiles faster than a graph for each."""

    def __init__(self, tensors: list[PackedTensor]) -> None:
        super().__init__()
        self.writers = nn.ModuleList(packed_tensor._ValueWriter(p.scheme) for p in tensors)

    def forward(self, calls: list[tuple[Any, ...]]) -> None:
        for write, call in zip(self.writers, calls, strict=True):
            write(*call)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_values_have_the_bits_of_torchs_operations(backend: str) -> None:
    tensors, calls = [example(scheme, 3, 48) for scheme in SCHEMES], []
    for packed, dtype in zip(tensors, cycle(DTYPES)):
        low = None if packed.zero_point is None else -packed.zero_point.float()
        numbers = (
            None if p is None else packed._broadcast(p, None, (3, 48)) for p in (packed.scale, low)
        )
        calls.append((torch.empty(3, 48, dtype=dtype), packed.parts.packed, *numbers))
    torch.compile(Unpacking(tensors), backend=backend, fullgraph=True)(calls)
    for packed, (values, *_) in zip(tensors, calls, strict=True):
        assert torch.equal(values, packed.dequantize(values.dtype)), packed.scheme


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU counts as a GPU."""
    monkeypatch.setattr(packed_tensor, "_NO_COMPILER", set())
    is_compiled = lambda device: device not in packed_tensor._NO_COMPILER  # noqa: E731
    monkeypatch.setattr(packed_tensor, "compiles", is_compiled)
    torch.compiler.reset()
    packed_tensor._compiled.cache_clear()
    yield
    packed_tensor._compiled.cache_clear()  # it holds graphs of a test's backend


def graphs_for(monkeypatch: pytest.MonkeyPatch, backend: Any) -> list[Any]:
    """The graphs that `dequantize` compiles from now on, with `backend`."""
    graphs: list[Any] = []

    def recorded(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend(backend)(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=recorded))
    return graphs


@pytest.mark.parametrize("kind", [PerBlock(8), PerChannel(2)], ids=str)
def test_experts_and_rows_are_compiled_once(kind: Any, on_gpu: None, monkeypatch: Any) -> None:
    graphs = graphs_for(monkeypatch, "aot_eager")
    for experts, count in ((4, 24), (5, 48)):
        packed = example(Scheme(3, False, kind), experts, 2, count)
        whole = packed.quantized.dequantize().bfloat16()
        for index in (None, 2, slice(1, 3), torch.tensor([[3, 0], [0, 1]])):
            expected = whole if index is None else whole[index]
            assert torch.equal(packed.dequantize(torch.bfloat16, index), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_and_backward_unpack_in_a_compiled_layer(
    compiled: bool, on_gpu: None, monkeypatch: Any
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(32, 8)
    layer = pack_module(plain, quantized(plain.weight, "w4-block16-asymmetric"))
    call: Any = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    graphs = graphs_for(monkeypatch, "aot_eager")
    x = torch.randn(3, 32, requires_grad=True)
    y = call(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert graphs
    weight = layer.tensor.quantized.dequantize()
    assert torch.equal(y, nn.functional.linear(x, weight, layer.bias))
    assert torch.equal(gradient, torch.ones(3, 8) @ weight)


def test_torch_unpacks_where_nothing_compiles(on_gpu: None, monkeypatch: Any) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no Triton here\nmore")

    packed = example(Scheme(4, granularity=PerBlock(16)), 3, 48)
    floats = example(Scheme(4, False, PerBlock(16), True), 3, 48)  # offsets that are not compiled
    expected = packed.quantized.dequantize()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    assert torch.equal(floats.dequantize(), floats.quantized.dequantize())
    with pytest.warns(QwloraWarning, match="cpu .*no Triton here"):
        assert torch.equal(packed.dequantize(), expected)
    assert torch.equal(packed.dequantize(), expected)  # without a warning
    monkeypatch.undo()
    assert packed_tensor.compiles(torch.device("cuda"))
    assert not packed_tensor.compiles(torch.device("cpu"))
