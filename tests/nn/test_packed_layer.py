"""Packed layers by themselves: values, gradients, what autograd keeps, copies, writes; and inputs, which they take and refuse as torch does."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from formats.packing import packed_and_twin, quantized
from qwlora import PackedLinear
from qwlora.errors import GridError, MergeError
from qwlora.grid.encoding import Encoding, QuantizedTensor, measure
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, PerTensor, Scheme, SignedBlock
from qwlora.nn import PackedLayer, is_packable, is_packed, pack_module
from qwlora.nn.packed_layer import (
    PackedEmbedding,
    pack_parameter_,
    place_empty_,
    unpack_linears_,
)
from qwlora.nn.packed_tensor import PackedTensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*uint8 is now deprecated"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # about the twin
]

SCHEMES = [
    *(Scheme(bits, granularity=PerBlock(16)) for bits in range(2, 9)),
    *(Scheme(bits, False, PerBlock(16)) for bits in (2, 3, 5, 8)),
    *(Scheme(4, False, granularity) for granularity in (PerTensor(), PerChannel(0), PerChannel(1))),
    *(Scheme(bits, granularity=kind(16)) for kind in (Lpbq, SignedBlock) for bits in (2, 4)),
    *(Scheme(4, False, kind, True) for kind in (PerTensor(), PerChannel(0), PerBlock(16))),
    *(Scheme(8, symmetric, PerChannel(0)) for symmetric in (True, False)),
    Scheme(8, False, PerTensor(), True),
]


class ScaledEmbedding(nn.Embedding):
    """As models have it that multiply what they look up."""

    def __init__(self, rows: int, width: int, padding_idx: int, embed_scale: float):
        super().__init__(rows, width, padding_idx)
        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class OwnProduct(nn.Linear):
    """A Linear whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + 1


REFLECT: dict[str, Any] = {"padding": "same", "padding_mode": "reflect"}


def cases() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(96, 40), torch.randn(3, 7, 96)),
        "linear, 1-D": (nn.Linear(96, 40), torch.randn(96)),
        "linear, no rows": (nn.Linear(96, 40), torch.randn(0, 96)),
        "no bias": (nn.Linear(96, 40, bias=False), torch.randn(3, 96)),
        "Conv1D": (Conv1D(40, 96), torch.randn(3, 7, 96)),
        "own product": (OwnProduct(32, 40, bias=False), torch.randn(3, 32)),
        "embedding": (nn.Embedding(40, 48, padding_idx=3), torch.randint(0, 40, (3, 5))),
        "scaled embedding": (ScaledEmbedding(40, 48, 3, 7.0), torch.randint(0, 40, (3, 5))),
        "conv1d": (nn.Conv1d(4, 8, 4, padding="same", dilation=3), torch.randn(2, 4, 20)),
        "conv1d stride": (nn.Conv1d(4, 8, 8, stride=3, padding=2), torch.randn(2, 4, 20)),
        "conv2d": (nn.Conv2d(8, 6, (4, 2), padding=(1, 0), groups=2), torch.randn(2, 8, 7, 9)),
        "conv2d reflect": (nn.Conv2d(4, 6, 4, **REFLECT), torch.randn(2, 4, 7, 9)),
    }


def layer_and_twin(module: nn.Module, scheme: Scheme | str) -> tuple[Any, Any]:
    """A packed layer and its float twin."""
    packed, twin = packed_and_twin(nn.Sequential(module), scheme)
    return packed[0], twin[0]


def pair(name: str, scheme: Scheme | str = "w4-block16") -> tuple[nn.Module, nn.Module, Tensor]:
    """A packed layer, its float twin, an input."""
    module, x = cases()[name]
    return *layer_and_twin(module, scheme), x


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_layers_compute_with_exactly_their_integers_and_share_no_number(scheme: Scheme) -> None:
    for name in ("linear", "embedding", "scaled embedding"):
        layer, twin, x = pair(name, scheme)
        assert torch.equal(layer(x), twin(x))
        assert torch.equal(layer.weight + 0, twin.weight)
        assert torch.equal(layer.encoding.dequantize(layer.codes), twin.weight)
        assert torch.equal(layer.quantized.dequantize(), twin.weight)
    assert isinstance(layer, PackedEmbedding)
    assert layer.padding_idx == 3
    module = nn.Linear(96, 40)
    found = quantized(module.weight * 1.1, scheme)
    layer = pack_module(module, found)
    expected = layer.tensor.dequantize()
    grid, tensor = layer.encoding, layer.tensor
    given = [found.codes, found.encoding.scale, found.encoding.low_end]
    read = [layer.codes, layer.quantized.codes, grid.scale, grid.low_end, tensor.scale]
    read += [part for part in (tensor.zero_point,) if part is not None]
    for numbers in [*given, *read]:
        numbers.zero_()
    assert torch.equal(layer.tensor.dequantize(), expected)


@pytest.mark.parametrize("name", cases())
def test_every_kind_computes_what_its_twin_computes_and_keeps_codes_only(name: str) -> None:
    layer, twin, x = pair(name)
    assert is_packed(layer)
    assert isinstance(layer, nn.Linear if isinstance(twin, Conv1D) else type(twin))
    x = x.requires_grad_(x.is_floating_point())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = layer(x)
    assert not any(t.numel() == twin.weight.numel() for t in kept)
    expected = twin(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    leaves = [
        [t for t in (x, getattr(m, "bias", None)) if t is not None and t.requires_grad]
        for m in (layer, twin)
    ]
    if leaves[0]:
        seed = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, leaves[0], seed),
            torch.autograd.grad(expected, leaves[1], seed),
        )


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_changes_the_computation_and_not_the_grid(name: str, dtype: torch.dtype) -> None:
    layer, twin, x = pair(name)
    if name == "linear":
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(layer(x), twin(x))
    before = layer.quantized
    layer.to(dtype)
    twin.weight.data = twin.weight.data.to(dtype)  # the float32 product, rounded once
    assert layer.weight.dtype == dtype
    x = x.to(dtype) if x.is_floating_point() else x
    found = layer(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, twin.to(dtype)(x))
    after = layer.quantized
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.encoding.scale, before.encoding.scale)
    assert layer.to(torch.float32)(cases()[name][1]).dtype == torch.float32


def test_copies_are_independent_and_a_state_dict_goes_round_without_rounding() -> None:
    layer, twin, x = pair("linear", "w4-block16-asymmetric")
    assert set(layer.state_dict()) == {"packed", "scale", "zero_point", "bias"}
    for assign in (False, True):
        other = place_empty_(nn.Sequential(nn.Linear(96, 40)), "0", layer.scheme)
        assert other.packed.is_meta
        other = other if assign else other.to_empty(device="cpu")
        assert isinstance(other, PackedLinear)
        assert other.scale.dtype == torch.float16
        other.load_state_dict(layer.state_dict(), assign=assign)
        assert torch.equal(other(x), twin(x))
    copied = copy.deepcopy(layer)
    layer.packed.zero_()
    assert torch.equal(copied(x), twin(x))


def test_a_look_at_a_weight_answers_without_unpacking_and_gives_its_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, twin, _ = pair("linear")
    weight, values = layer.weight, twin.weight
    with monkeypatch.context() as patch:
        patch.setattr(PackedTensor, "dequantize", lambda *_: pytest.fail("unpacked"))
        look = (weight.shape, weight.ndim, weight.dtype, weight.device.type, weight.numel())
        assert look == ((40, 96), 2, torch.float32, "cpu", 3840)
        assert not weight.requires_grad
        assert weight.T.shape == (96, 40)
        assert weight.data is not None
    assert torch.equal(weight[3:5], values[3:5])
    assert torch.equal(weight.T @ torch.eye(40), values.T)
    assert torch.equal(torch.cat([weight, weight]), torch.cat([values, values]))
    assert torch.equal(weight.to(torch.bfloat16), values.to(torch.bfloat16))
    assert weight.numpy(force=True).tolist() == values.tolist()


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.add_(1),
        lambda w: w.mul_(2),
        lambda w: w.__setitem__(0, 0.0),
        lambda w: setattr(w, "data", torch.zeros(40, 96)),
        lambda w: torch.add(w, 1, out=w),
        lambda w: nn.init.zeros_(w),
    ],
)
def test_writing_to_a_weight_is_refused(write) -> None:
    layer, _, _ = pair("linear")
    with pytest.raises(MergeError, match=r"packed integers.*qwlora merge JOB.*Keep the adapter"):
        write(layer.weight)
    with pytest.raises(MergeError):
        layer.weight = nn.Parameter(torch.zeros(40, 96))
    with pytest.raises(MergeError):
        layer.weight += 1


def test_what_cannot_be_packed_is_refused_and_everything_else_is_kept() -> None:
    module = nn.Linear(96, 40).eval()
    with pytest.raises(GridError, match=r"codes have shape \[40, 64\].* of Linear.*\[40, 96\]"):
        pack_module(module, quantized(torch.randn(40, 64), "w4-block16"))
    with pytest.raises(GridError, match="LayerNorm has no weight that can be packed"):
        pack_module(nn.LayerNorm(4), quantized(torch.randn(40, 64), "w4-block16"))
    assert not is_packable(nn.Embedding(4, 4, max_norm=1.0))
    module.register_forward_hook(lambda *_: torch.tensor(5.0))
    module.note = "kept"
    layer = pack_module(module, quantized(module.weight, "w4-channel"))
    assert isinstance(layer, PackedLayer)
    assert not is_packable(layer)
    assert layer.bias is module.bias
    assert (layer.training, layer.note, layer(torch.randn(1, 96))) == (False, "kept", 5.0)
    assert "weight" in dict(module.named_parameters())  # the float module is as it was
    module.scale = 3
    with pytest.raises(GridError, match="Linear already has an attribute 'scale'"):
        pack_module(module, quantized(module.weight, "w4-channel"))
    offset = torch.full((2,), -8, dtype=torch.int32)
    encoding = Encoding(Scheme(4, granularity=PerChannel(0)), torch.full((2,), 0.5), offset)
    signed = torch.arange(-8, 8, dtype=torch.int32).view(2, -1)
    for codes in (signed, signed.to(torch.int8), torch.ones_like(signed).to(torch.int8)):
        with pytest.raises(GridError, match=r"signed .*\(codes.int\(\) \+ 8\)"):
            QuantizedTensor(codes, encoding)
    layer = pack_module(nn.Linear(8, 2), QuantizedTensor((signed + 8).to(torch.uint8), encoding))
    assert torch.equal(layer.tensor.dequantize(), signed * 0.5)


ERRORS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives: its value, or the class of its error."""
    try:
        return call()
    except ERRORS as error:
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


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("x", FEATURES)
def test_linear_layers(x: str, layer: str) -> None:
    torch.manual_seed(0)
    ours, twin = layer_and_twin(LAYERS[layer](), "w8-channel")
    if layer == "Conv1D":  # it becomes a linear layer
        linear = nn.Linear(32, 48)
        linear.weight.data, linear.bias = twin.weight.data.T.contiguous(), twin.bias
        twin = linear
    unpack_linears_(floats := nn.Sequential(copy.deepcopy(ours)))
    assert not isinstance(floats[0], PackedLinear)
    with torch.no_grad():
        found, unpacked, expected = (
            outcome(lambda m=m: m(FEATURES[x])) for m in (ours, floats[0], twin)
        )
    assert_same(found, expected)
    assert_same(unpacked, expected)


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
    layer, twin = layer_and_twin(nn.Embedding(40, 32), scheme)
    assert_same(*(outcome(lambda m=m: m(IDS[index])) for m in (layer, twin)))
    for padding in (None, 3, -1, 40):
        calls = (
            outcome(lambda w=w, padding=padding: F.embedding(IDS[index], w, padding_idx=padding))
            for w in (layer.weight, twin.weight)
        )
        assert_same(*calls)


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
    lambda w: F.conv1d(floats(0, 4, 9), w),
    lambda w: F.conv1d(floats(2, 4, 9).bfloat16(), w),
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
        module = nn.Linear(32, 48) if kind == "matrix" else nn.Conv1d(4, 6, 3)
        layer, twin = layer_and_twin(module, "w8-channel")
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
