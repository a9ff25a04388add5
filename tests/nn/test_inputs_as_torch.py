"""Packed layers, and functions of torch on packed weights, accept and refuse what they do with floats."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from formats.packing import quantized
from qwlora.grid.encoding import QuantizedTensor, measure
from qwlora.grid.scheme import PerChannel, Scheme
from qwlora.nn import pack_module, weight_out_in
from qwlora.nn.few_row_kernels import use_few_row_kernels_
from qwlora.nn.packed_layer import pack_parameter_
from qwlora.nn.packed_tensor import PackedTensor

pytestmark = pytest.mark.filterwarnings("ignore:.*uint8 is now deprecated")


def pair(module: nn.Module, scheme: str = "w8-channel") -> tuple[nn.Module, nn.Module]:
    """A packed layer and its float twin."""
    found = quantized(weight_out_in(module), scheme)
    layer, twin = pack_module(module, found), copy.deepcopy(module)
    values = found.dequantize()
    twin.weight.data = (
        values.T.contiguous() if isinstance(module, Conv1D) else values.view(module.weight.shape)
    )
    return layer, twin


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives: its value, or the class of its error."""
    try:
        return call()
    except (
        ArithmeticError,
        AssertionError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        return type(error)


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Tensor) and isinstance(ours, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    else:
        assert ours == theirs


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


FEATURES: dict[str, Any] = {
    "1-D": floats(32),
    "0-D": torch.tensor(1.0),
    "no rows": floats(0, 32),
    "no rows, three axes": floats(2, 0, 32),
    "four axes": floats(2, 1, 3, 32),
    "strided": floats(32, 3).T,
    "too wide": floats(3, 33),
    "one wide": floats(3, 1),
    "float64": floats(3, 32).double(),
    "bfloat16": floats(3, 32).bfloat16(),
    "integers": torch.ones(3, 32, dtype=torch.long),
    "a list": [1.0] * 32,
    "nothing": None,
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(32, 48),
    "no bias": lambda: nn.Linear(32, 48, bias=False),
    "Conv1D": lambda: Conv1D(48, 32),
}


@pytest.mark.parametrize("few_rows", [False, True], ids=["", "few rows"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("x", FEATURES)
def test_linear_layers(x: str, layer: str, few_rows: bool) -> None:
    torch.manual_seed(0)
    ours, twin = pair(LAYERS[layer]())
    if layer == "Conv1D":  # it becomes a linear layer
        linear = nn.Linear(32, 48)
        linear.weight.data, linear.bias = twin.weight.data.T.contiguous(), twin.bias
        twin = linear
    assert not few_rows or use_few_row_kernels_(nn.Sequential(ours)) == 1
    with torch.no_grad():
        found, expected = (outcome(lambda m=m: m(FEATURES[x])) for m in (ours, twin))
    if few_rows and isinstance(found, Tensor) and isinstance(expected, Tensor):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    else:
        assert_same(found, expected)


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 5, 32), (0, 32)], ids=str)
def test_gradients_of_any_number_of_axes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    results = []
    for layer in pair(nn.Linear(32, 48)):
        x = floats(*shape).requires_grad_()
        layer.bias = nn.Parameter(floats(48))
        layer(x).square().sum().backward()
        results.append((x.grad, layer.bias.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


IDS: dict[str, Any] = {
    "0-D": torch.tensor(3),
    "none": torch.empty(0, dtype=torch.long),
    "none, three axes": torch.empty(2, 0, 3, dtype=torch.long),
    "int32": torch.tensor([[1, 2], [39, 0]], dtype=torch.int32),
    "negative": torch.tensor([0, -1]),
    "all negative": torch.tensor([-40]),
    "too large": torch.tensor([[40]]),
    "bool": torch.ones(40, dtype=torch.bool),
    "uint8": torch.ones(40, dtype=torch.uint8),
    "int16": torch.ones(3, dtype=torch.int16),
    "floats": torch.ones(3),
    "a list": [1, 2],
    "a number": 3,
    "a slice": slice(0, 2),
    "nothing": None,
}


@pytest.mark.parametrize("scheme", ["w4-block16", "w8-channel", "w5-tensor-asymmetric"])
@pytest.mark.parametrize("index", IDS)
def test_embeddings(index: str, scheme: str) -> None:
    torch.manual_seed(0)
    layer, twin = pair(nn.Embedding(40, 32), scheme)
    assert_same(*(outcome(lambda m=m: m(IDS[index])) for m in (layer, twin)))
    for padding in (None, 3, -1, 40):
        calls = (
            outcome(lambda w=w, padding=padding: F.embedding(IDS[index], w, padding_idx=padding))
            for w in (layer.weight, twin.weight)
        )
        assert_same(*calls)


@pytest.mark.parametrize(
    "image",
    [
        floats(2, 4, 7, 9),
        floats(4, 7, 9),
        floats(0, 4, 7, 9),
        floats(2, 3, 7, 9),  # too few channels
        floats(2, 4, 1, 9),  # too small
        floats(7, 9),
        floats(2, 4, 7, 9).bfloat16(),
        [1.0],
    ],
    ids=lambda x: str(getattr(x, "shape", x)),
)
def test_convolutions(image: Any) -> None:
    torch.manual_seed(0)
    assert_same(*(outcome(lambda m=m: m(image)) for m in pair(nn.Conv2d(4, 6, 3, bias=False))))


X, OFFSETS = floats(3, 32), torch.tensor([2, 2, 5], dtype=torch.int32)
MATRIX: list[Callable[[Tensor], Any]] = [
    lambda w: F.linear(input=X, weight=w),
    lambda w: F.linear(X, w, bias=torch.ones(48)),
    lambda w: torch.matmul(input=X, other=w.T),
    lambda w: torch.mm(input=X, mat2=w.T),
    lambda w: X.matmul(other=w.T),
    lambda w: X.mm(mat2=w.T),
    lambda w: torch.mm(X[None], w.T),
    lambda w: torch.matmul(X[0], w.T),
    lambda w: X[None] @ w.T,
    lambda w: F.embedding(input=torch.tensor([2, 0]), weight=w),
    lambda w: F.embedding(torch.tensor([2]), w, max_norm=0.5),
    lambda w: torch.transpose(w, dim0=0, dim1=-1) + 0,
    lambda w: w.transpose(dim0=-1, dim1=0) + 0,
    lambda w: w.transpose(0, 3),
    lambda w: w.transpose(0, -2) + 0,
    lambda w: torch.t(input=w) + 0,
    lambda w: F.linear(X[:, 1:], w),
    lambda w: X.double() @ w.T,
    lambda w: w[48],
    lambda w: w[-1],
]
KERNEL: list[Callable[[Tensor], Any]] = [
    lambda w: F.conv1d(input=floats(2, 4, 9), weight=w, stride=2),
    lambda w: w.transpose(1, 2) + 0,
    lambda w: w[1] + 0,
    lambda w: w[torch.tensor([1, 0])],
]
EXPERTS: list[Callable[[Tensor], Any]] = [
    *(lambda w, i=i: w[i] + 0 for i in (2, -1, 3, -4, torch.tensor(1), torch.tensor([2, 0]))),
    lambda w: w[torch.tensor([True, False, True])],
    lambda w: w[torch.tensor(1, dtype=torch.uint8)],
    lambda w: floats(5, 32) @ w[1].T,
    lambda w: w.transpose(-1, -2) + 0,
    *(
        lambda w, x=x: F.grouped_mm(x, w.mT, offs=OFFSETS)
        for x in (floats(5, 32), floats(0, 32), floats(5, 36), floats(5, 32).bfloat16())
    ),
]


def weights(kind: str) -> tuple[Tensor, Tensor]:
    """A packed weight and its values."""
    torch.manual_seed(0)
    if kind != "experts":
        layer, twin = pair(nn.Linear(32, 48) if kind == "matrix" else nn.Conv1d(4, 6, 3))
        return layer.weight, twin.weight.detach()
    module = nn.Module()
    module.up = nn.Parameter(floats(3, 16, 32))
    grid = measure(module.up.detach(), Scheme(8, granularity=PerChannel(1)))
    found = QuantizedTensor(grid.quantize(module.up.detach()), grid)
    pack_parameter_(module, "up", PackedTensor.from_quantized(found))
    return module.up, found.dequantize()


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (kind, call)
        for kind, calls in (("matrix", MATRIX), ("kernel", KERNEL), ("experts", EXPERTS))
        for call in calls
    ],
)
def test_functions_of_weights(kind: str, call: Callable[[Tensor], Any]) -> None:
    assert_same(*(outcome(lambda w=w: call(w)) for w in weights(kind)))
