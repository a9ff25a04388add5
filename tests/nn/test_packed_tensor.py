"""Packing loses nothing; unpacking, in torch's operations or compiled, gives the float32 product rounded once."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from formats.packing import quantized
from grid.strategies import cases, thorough
from qwlora.errors import GridError, QwloraWarning
from qwlora.grid.encoding import Encoding, QuantizedTensor, measure
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, PerTensor, Scheme, SignedBlock
from qwlora.nn import custom_ops, pack_module, packed_tensor
from qwlora.nn.packed_tensor import PackedTensor, narrowest

NARROW = (2, 3, 4, 5, 6, 7, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = [
    *(Scheme(bits, symmetric, PerBlock(16)) for bits in NARROW for symmetric in (True, False)),
    *(Scheme(bits, granularity=Lpbq(16, more)) for bits, more in ((4, 4), (2, 3), (3, 8))),
    *(Scheme(bits, granularity=SignedBlock(16)) for bits in (2, 5)),
    *(
        Scheme(bits, symmetric, kind)
        for bits, symmetric in ((4, True), (3, False), (8, False))
        for kind in (PerTensor(), PerChannel(0), PerChannel(1))
    ),
]


@st.composite
def tensors(draw):
    """On any grid: with integer offsets, float offsets or integer scales."""
    x, scheme = draw(cases(bitwidths=NARROW))
    kind = draw(st.sampled_from(["plain", "float", "low power"]))
    if kind == "float" and not scheme.symmetric:
        scheme = replace(scheme, float_offset=True)
    if kind == "low power" and isinstance(scheme.granularity, PerBlock):
        blocks = Lpbq(scheme.granularity.size, draw(st.integers(1, 8)))
        scheme = Scheme(scheme.bitwidth, granularity=blocks)
    return quantized(x, scheme)


@thorough
@given(tensors(), st.sampled_from(DTYPES))
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
        learns = operator is custom_ops.linear
        tests = {} if learns else {"test_utils": ("test_schema", "test_faketensor")}
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


def example(scheme: Scheme, *shape: int) -> PackedTensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    encoding = measure(x, scheme)
    encoding = Encoding(scheme, scheme.granularity.nearest(encoding.scale), encoding.low_end)
    return PackedTensor.from_quantized(QuantizedTensor(encoding.quantize(x), encoding))


@pytest.fixture
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


@pytest.mark.usefixtures("no_type_checks")
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
def on_gpu(no_type_checks: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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
