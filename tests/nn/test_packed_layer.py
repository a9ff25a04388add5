"""Packed layers by themselves: values, gradients, what autograd keeps, copies, types, files."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from formats.packing import quantized
from qwlora import PackedLinear
from qwlora.errors import GridError, MergeError
from qwlora.grid.encoding import Encoding, QuantizedTensor
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, PerTensor, Scheme, SignedBlock
from qwlora.nn import PackedLayer, is_packable, is_packed, pack_module, weight_out_in
from qwlora.nn.packed_layer import PackedEmbedding, place_empty_
from qwlora.nn.packed_tensor import PackedTensor

SCHEMES = [
    *(Scheme(bits, granularity=PerBlock(16)) for bits in range(2, 9)),
    *(Scheme(bits, False, PerBlock(16)) for bits in (2, 3, 5)),
    *(Scheme(4, False, granularity) for granularity in (PerTensor(), PerChannel(0), PerChannel(1))),
    *(Scheme(bits, granularity=kind(16)) for kind in (Lpbq, SignedBlock) for bits in (2, 4)),
    *(Scheme(4, False, kind, True) for kind in (PerTensor(), PerChannel(0), PerBlock(16))),
]


class ScaledEmbedding(nn.Embedding):
    """As models have it that multiply what they look up."""

    def __init__(self, rows: int, width: int, padding_idx: int, embed_scale: float):
        super().__init__(rows, width, padding_idx)
        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class OwnProduct(nn.Linear):
    """A Linear whose forward is its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + 1


REFLECT: dict[str, Any] = {"padding": "same", "padding_mode": "reflect"}


def cases() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    conv1d = Conv1D(40, 96)
    return {
        "linear": (nn.Linear(96, 40), torch.randn(3, 7, 96)),
        "no bias": (nn.Linear(96, 40, bias=False), torch.randn(3, 96)),
        "Conv1D": (conv1d, torch.randn(3, 7, 96)),
        "own product": (OwnProduct(32, 40, bias=False), torch.randn(3, 32)),
        "embedding": (nn.Embedding(40, 48, padding_idx=3), torch.randint(0, 40, (3, 5))),
        "scaled embedding": (ScaledEmbedding(40, 48, 3, 7.0), torch.randint(0, 40, (3, 5))),
        "conv1d": (nn.Conv1d(4, 8, 4, padding="same", dilation=3), torch.randn(2, 4, 20)),
        "conv1d stride": (nn.Conv1d(4, 8, 8, stride=3, padding=2), torch.randn(2, 4, 20)),
        "conv2d": (nn.Conv2d(8, 6, (4, 2), padding=(1, 0), groups=2), torch.randn(2, 8, 7, 9)),
        "conv2d reflect": (nn.Conv2d(4, 6, 4, **REFLECT), torch.randn(2, 4, 7, 9)),
    }


def pair(
    name: str, scheme: Scheme | str = "w4-block16"
) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A packed layer, its float twin, an input."""
    module, x = cases()[name]
    found = quantized(weight_out_in(module), scheme)
    layer = pack_module(module, found)
    twin = copy.deepcopy(module)
    values = found.dequantize()
    values = values.T.contiguous() if isinstance(module, Conv1D) else values
    twin.weight.data = values.view(module.weight.shape)
    return layer, twin, x


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_layers_compute_with_exactly_their_integers(scheme: Scheme) -> None:
    for name in ("linear", "embedding", "scaled embedding"):
        layer, twin, x = pair(name, scheme)
        assert torch.equal(layer(x), twin(x))
        assert torch.equal(layer.weight + 0, twin.weight)
        assert torch.equal(layer.encoding.dequantize(layer.codes), twin.weight)
        assert torch.equal(layer.quantized.dequantize(), twin.weight)
    assert isinstance(layer, PackedEmbedding)
    assert layer.padding_idx == 3


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch, about the twin
@pytest.mark.parametrize("name", cases())
def test_every_kind_computes_what_its_twin_computes_and_keeps_codes_only(name: str) -> None:
    layer, twin, x = pair(name)
    assert is_packed(layer)
    assert isinstance(layer, nn.Linear if isinstance(twin, Conv1D) else type(twin))
    x = x.requires_grad_(x.is_floating_point())
    kept: list[torch.Tensor] = []
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


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
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


WIDE = [Scheme(8, symmetric, PerChannel(0)) for symmetric in (True, False)]
WIDE += [Scheme(8, False, PerBlock(16)), Scheme(8, False, PerTensor(), True)]


@pytest.mark.parametrize("scheme", [*SCHEMES, *WIDE], ids=str)
def test_a_layer_shares_no_number_with_what_it_was_made_of_or_gives(scheme: Scheme) -> None:
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
